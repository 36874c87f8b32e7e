"""Engines: each a folder here, or in another package that names it in an entry point."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["ENTRY_POINTS", "engines"]

ENTRY_POINTS = "psi_kv_governor.engines"
"""Group under which a package names its engines: `name = "package.module"`, what `Description.engine` says.
The package's own are there too."""


def engines() -> Mapping[str, EntryPoint]:
    """Every engine by its name. None is imported."""
    from importlib import metadata  # 1.7 MB with what it imports: not for whoever opens a model

    return {point.name: point for point in metadata.entry_points(group=ENTRY_POINTS)}
