"""Whose stall counts at which level."""

from __future__ import annotations

import msgspec

from psi_kv_governor.pressure.reading import MACHINE, Level, Reading


def limited(reading: Reading) -> Reading:
    """`reading` with the levels that have a limit, each with the stall that can be its own doing.

    - The stall of a level counts if its limit bites: if the kernel reclaims on its account. Another
      container that thrashes at its own limit is no shortage of the machine.
    - A cgroup without a limit of its own can only suffer what the machine lacks: there the worse of both is
      the machine's.
    - A limit without PSI of its own takes what a cgroup without a limit tells, else the machine.
    - Where nothing has a limit, each stall counts as it is.
    """
    bound = [level for level in reading.levels if level.limit_bytes and level.headroom_bytes is not None]
    if not bound:
        levels = reading.levels or (Level(name=MACHINE),)
        return msgspec.structs.replace(reading, levels=levels)
    free = [level for level in reading.levels if level not in bound]
    machine = next((level for level in bound if level.name == MACHINE), None)
    return msgspec.structs.replace(reading, levels=tuple(_own_stall(level, free, machine) for level in bound))


def _own_stall(level: Level, free: list[Level], machine: Level | None) -> Level:
    if level.bites is False:
        return msgspec.structs.replace(level, some=0.0, full=0.0)
    told = [level, *free] if level.name == MACHINE or level.some is None else [level]
    some, full = _most(told, "some"), _most(told, "full")
    if some is None and machine is not None:
        some, full = machine.some, machine.full
    return msgspec.structs.replace(level, some=some, full=full)


def _most(levels: list[Level], kind: str) -> float | None:
    shares: list[float] = [share for level in levels if (share := getattr(level, kind)) is not None]
    return max(shares, default=None)
