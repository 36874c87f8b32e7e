"""Engines: each a folder here, or in another package that names it in an entry point."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

__all__ = ["ENTRY_POINTS", "engines"]

ENTRY_POINTS = "psi_kv_governor.engines"
"""Group under which a package names its engines: `name = "package.module"`, what `Description.engine` says.
The package's own are there too."""


def engines() -> Mapping[str, metadata.EntryPoint]:
    """Every engine by its name. None is imported."""
    return {point.name: point for point in metadata.entry_points(group=ENTRY_POINTS)}
