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
    """The caches of one engine as the law sees them. All amounts are bytes."""

    live_bytes: int
    """What attention looks at, and blobs: resident or not."""
    masked_bytes: int
    """Parked and masked: RESTORE brings it back."""
    lost_bytes: int
    """Evicted: only decoding it again brings it back."""
    trimmable_bytes: int
    """What can be given up now: resident, outside what is protected, and above the floor."""
    lossless_bytes: int
    """The part of `trimmable_bytes` that costs no fidelity: pages of free cells, blobs, idle sequences. It
    is given first; budget and futility never hold it back."""
    step_bytes: int
    """The smallest step that can be taken: one block."""
    last_used_s: float = 0.0
    """Monotonic time of the last decode. Of several governors, the least recently used gives first and takes
    last."""

    @property
    def total_bytes(self) -> int:
        """Length of the contexts: live, masked and lost."""
        return self.live_bytes + self.masked_bytes + self.lost_bytes


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """One answer of the law."""

    action: Action
    n_bytes: int
    """How much to give up (TRIM) or to put back (RESTORE, in slices with a reading between); 0 with NONE."""
    mode: Mode
    reason: str
    """One clause with the figures that led here, and the level that they are of."""
    urgent: bool = False
    """Memory is about to be gone: the cheapest bytes first, and nothing that can wait is waited for."""
    write_behind: bool = False
    """Memory is nearly short: what is dirty should be written now, so that later steps copy nothing."""
