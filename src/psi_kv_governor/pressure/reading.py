"""What a pressure source says, and the protocol that each source follows."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import msgspec

MACHINE = "machine"
"""Name of the level that is the whole machine; every other level is a cgroup, named by its folder."""


class Level(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that can run short.

    The machine, a cgroup on the way up to the root, or the line at which another program begins to kill.
    """

    name: str
    some: float | None = None
    """Share of the interval (0 to 1) in which at least one of its tasks stood still for want of memory. None
    where it keeps no PSI, or the counters cover no time yet."""
    full: float | None = None
    """The same for all of its tasks at once."""
    headroom_bytes: int | None = None
    """Bytes that can still be taken before its limit is met; None where it has none."""
    limit_bytes: int | None = None
    """The limit that `headroom_bytes` is measured against."""
    limit: str = ""
    """What sets the limit: `memory.max`, `memory.high`, `MemAvailable`, or whose line it is."""
    mapped_bytes: int = 0
    """Clean file pages that others have mapped. The kernel can drop them: room that `headroom_bytes` leaves
    out, since it is not known from here whether anybody would miss them."""
    refault_bytes_per_s: float = 0.0
    """File pages that were dropped and had to be read again: somebody did miss them."""
    bites: bool | None = None
    """Whether the kernel reclaimed on account of this very limit in the last moments, so that a stall can be
    its doing. None where that is not told."""
    grain_bytes: int = 0
    """How far the count may be off: each processor holds up to 64 charged pages that nobody uses."""
    swap_bytes: int | None = None
    """Swap that is still free; None where nothing tells."""


class Bound(NamedTuple):
    """What of a level is no news."""

    until_s: float
    """Sooner than that nobody can have taken so much of it that it would matter: it need not be read."""
    slack_bytes: int
    """So much less headroom than at the last reading changes nothing."""


class Bounds(NamedTuple):
    """How far the machine may go from the last reading before another is due."""

    until_s: float
    levels: dict[str, Bound]
    """By name, for each that has a limit."""


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """How a governor stands after a turn, as it says to the others."""

    last_used_s: float = 0.0
    trimmable_bytes: int = 0
    masked_bytes: int = 0
    restoring: bool = False
    claim_bytes: int = 0
    """What its restore may still take of the room."""
    resident_bytes: int = 0
    """Of its process: what it takes or gives is no neighbour's fall or rise."""


class Neighbour(Standing, frozen=True, kw_only=True):
    """What another governor of this user says of itself."""

    id: str
    levels: tuple[str, ...]
    """Names of the levels it lies in: it shares the room of those that both have."""
    work: tuple[tuple[float, float], ...] = ()
    """(from, until) in monotonic seconds of its last parkings and restores; one that runs lasts until now.
    Stall of those times may be their doing."""


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """One look at the machine.

    `some` and `full` of the levels are shares of wall time (0 to 1) over the `interval_s` before `time_s`:
    deltas of `total=` in a PSI file (kernel, Documentation/accounting/psi.rst), not the kernel's running
    averages.
    """

    time_s: float
    """Monotonic time of the look; only differences mean anything."""
    interval_s: float
    """Wall time that the stall covers; 0 on the first reading of a source."""
    levels: tuple[Level, ...] = ()
    """The machine, the own cgroup, each cgroup above it, and the lines of others."""
    own_resident_bytes: int | None = None
    """Resident memory of this process: what it took itself, nobody else took. None where nothing tells."""
    own: float = 0.0
    """Share of the interval (0 to 1) in which a governor was parking or restoring, this one or a neighbour:
    so much of the stall may be its doing. Filled in by the governor."""
    neighbours: tuple[Neighbour, ...] = ()
    """Other governors of this user."""
    source: str = ""
    """Where it came from, for events and `doctor`."""

    @property
    def worst(self) -> Level | None:
        """For display: the level with the least of its limit left, else the first one."""
        limited = [level for level in self.levels if level.headroom_bytes is not None and level.limit_bytes]
        return min(limited, key=_share_left, default=self.levels[0] if self.levels else None)

    @property
    def some(self) -> float:
        """For display: the stall of the worst level, or of a cgroup without a limit of its own."""
        return self._stall("some")

    @property
    def full(self) -> float:
        """As `some`, of all tasks at once."""
        return self._stall("full")

    @property
    def headroom_bytes(self) -> int | None:
        """Of the worst level."""
        return None if self.worst is None else self.worst.headroom_bytes

    @property
    def limit_bytes(self) -> int | None:
        """Of the worst level."""
        return None if self.worst is None else self.worst.limit_bytes

    def _stall(self, kind: str) -> float:
        worst = self.worst
        told = [level for level in self.levels if level is worst or level.limit_bytes is None]
        known = [share for level in told if (share := getattr(level, kind)) is not None]
        if not known:  # the worst keeps no PSI: what there is
            known = [share for level in self.levels if (share := getattr(level, kind)) is not None]
        return max(known, default=0.0)


def _share_left(level: Level) -> float:
    return (level.headroom_bytes or 0) / (level.limit_bytes or 1)


def one_level(
    *,
    time_s: float,
    interval_s: float,
    some: float = 0.0,
    full: float = 0.0,
    headroom_bytes: int | None = None,
    limit_bytes: int | None = None,
    own_resident_bytes: int | None = None,
    own: float = 0.0,
    source: str = "",
) -> Reading:
    """A reading of one level alone, the machine: of a simulation, or a script."""
    level = Level(name=MACHINE, some=some, full=full, headroom_bytes=headroom_bytes, limit_bytes=limit_bytes)
    return Reading(
        time_s=time_s,
        interval_s=interval_s,
        levels=(level,),
        own_resident_bytes=own_resident_bytes,
        own=own,
        source=source,
    )


class PressureSource(Protocol):
    """Reads the machine. It has no opinion on what to do."""

    @property
    def name(self) -> str:
        """What is read, in words a user can follow up."""

    def read(self) -> Reading:
        """Take a reading now.

        Raises SourceLostError when there is none to be had; it is asked again after a while, and less often
        each time.
        """

    def close(self) -> None:
        """Give back descriptors. Safe to call twice."""
