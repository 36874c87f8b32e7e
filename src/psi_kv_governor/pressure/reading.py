"""What a pressure source says, and the protocol that each source follows."""

from __future__ import annotations

from typing import Protocol

import msgspec


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """One look at the machine.

    `some` and `full` are shares of wall time (0 to 1) over the `interval_s` before `time_s` in which at
    least one task, or every task, stood still for want of memory: deltas of `total=` in a PSI file
    (kernel, Documentation/accounting/psi.rst), not the kernel's running averages.
    """

    time_s: float
    """Monotonic time of the look; only differences mean anything."""
    interval_s: float
    """Wall time that `some` and `full` cover; 0 on the first reading of a source."""
    some: float
    full: float
    headroom_bytes: int | None = None
    """Bytes that can still be taken before a limit bites; None where nothing tells."""
    limit_bytes: int | None = None
    """The limit that `headroom_bytes` is measured against: the cgroup's, or the machine's memory."""
    own_resident_bytes: int | None = None
    """Resident memory of this process: what it took itself, nobody else took. None where nothing tells."""
    own: float = 0.0
    """Share of the interval (0 to 1) in which the governor itself was spilling or restoring: so much of the
    stall may be its own doing. Filled in by the governor."""
    source: str = ""
    """Where it came from, for events and `doctor`."""


class PressureSource(Protocol):
    """Reads the machine. It has no opinion on what to do."""

    @property
    def name(self) -> str:
        """What is read, in words a user can follow up."""

    def read(self) -> Reading:
        """Take a reading now. Raises SourceLostError when the source is gone."""

    def close(self) -> None:
        """Give back descriptors. Safe to call twice."""
