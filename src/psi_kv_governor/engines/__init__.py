"""Engines: each a folder here, or in another package that names it in an entry point."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from types import ModuleType

from psi_kv_governor._nearest import unknown
from psi_kv_governor.errors import BadInputError

__all__ = ["ENTRY_POINTS", "engines", "get_engine"]

ENTRY_POINTS = "psi_kv_governor.engines"
"""Group under which a package names its engines: `name = "package.module"`, what `Description.engine` says.
The package's own are there too."""


def engines() -> Mapping[str, metadata.EntryPoint]:
    """Every engine by its name. None is imported."""
    return {point.name: point for point in metadata.entry_points(group=ENTRY_POINTS)}


def get_engine(name: str) -> ModuleType:
    """The module of the engine called `name`.

    Returns:
        The module, which offers what `docs/how-it-works.md` says of engines.

    Raises:
        BadInputError: There is none of that name, or its package can't be imported: somebody else's code
            may raise whatever it likes.
    """
    known = engines()
    if name not in known:
        raise BadInputError(unknown("engine", name, known))
    try:
        module = known[name].load()
    except (Exception, SystemExit) as error:
        first = (str(error).splitlines() or [""])[0]
        raise BadInputError(
            f"the engine {name} can't be used: {known[name].value} failed ({type(error).__name__}: {first})"
        ) from error
    if not isinstance(module, ModuleType):
        raise BadInputError(f"the engine {name} can't be used: {known[name].value} is no module")
    return module
