"""Engines: each a folder here, or in another package that names it in an entry point."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from psi_kv_governor.entry_points import named

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["ENTRY_POINTS", "engines"]

ENTRY_POINTS = "psi_kv_governor.engines"
"""Group under which a package names its engines: `name = "package.module"`, what `Description.engine` says.
The package's own are there too."""


def engines() -> Mapping[str, EntryPoint]:
    """Every engine by its name. None is imported."""
    return named(ENTRY_POINTS)
