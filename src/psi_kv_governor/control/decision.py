"""What goes into the law and what comes out of it."""

from __future__ import annotations

from enum import Enum

import msgspec


class Mode(str, Enum):
    """Where the governor stands. Each change of it is an event."""

    CALM = "calm"
    """No pressure, nothing given up."""
    WATCHING = "watching"
    """Between the low and the high threshold: nothing is done, nothing comes back."""
    TRIMMING = "trimming"
    """Above the high threshold: the cache is giving memory back."""
    HOLDING = "holding"
    """Something is given up, and it is not yet safe (or not possible) to go either way."""
    RESTORING = "restoring"
    """Quiet for long enough: what was given up comes back."""


class Action(str, Enum):
    """What the law asks for."""

    NONE = "none"
    TRIM = "trim"
    RESTORE = "restore"


class CacheSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's cache as the law sees it. All counts are in cells."""

    live_cells: int
    """Cells of the governed sequence that are in the cache."""
    spilled_cells: int
    """Cells that wait in the store."""
    lost_cells: int
    """Cells whose rows are gone; they can be recomputed from the tokens."""
    trimmable_cells: int
    """Live cells outside the protected sinks and window."""
    cell_bytes: int
    """Bytes of one cell: its K and V rows in every layer."""

    @property
    def total_cells(self) -> int:
        """Length of the context: live, spilled and lost."""
        return self.live_cells + self.spilled_cells + self.lost_cells


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """One answer of the law."""

    action: Action
    cells: int
    """How many cells to give up (TRIM) or to put back (RESTORE); 0 with NONE."""
    mode: Mode
    reason: str
    """One clause with the figures that led here."""
    urgent: bool = False
    """Memory is about to be gone: a decode that runs is interrupted rather than waited for."""
