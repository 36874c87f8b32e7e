"""What packages name for this one, by entry points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


def named(group: str) -> Mapping[str, EntryPoint]:
    """All of a group by their names. None is imported."""
    from importlib import metadata  # 1.7 MB with what it imports: not for whoever opens a model

    return {point.name: point for point in metadata.entry_points(group=group)}
