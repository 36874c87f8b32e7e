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
    if reading.levels and all(map(_speaks_for_itself, reading.levels)):
        return reading  # as on most machines at most moments
    bound: list[Level] = []
    free: list[Level] = []
    for level in reading.levels:
        (bound if level.limit_bytes and level.headroom_bytes is not None else free).append(level)
    if not bound:
        return reading if reading.levels else msgspec.structs.replace(reading, levels=(Level(name=MACHINE),))
    machine = next((level for level in bound if level.name == MACHINE), None)
    return msgspec.structs.replace(reading, levels=tuple(_own_stall(level, free, machine) for level in bound))


def _speaks_for_itself(level: Level) -> bool:
    limited = bool(level.limit_bytes) and level.headroom_bytes is not None
    return limited and level.some is not None and level.bites is not False


def _own_stall(level: Level, free: list[Level], machine: Level | None) -> Level:
    if level.bites is False:
        return msgspec.structs.replace(level, some=0.0, full=0.0)
    told = [level, *free] if level.name == MACHINE or level.some is None else [level]
    some = _most([one.some for one in told])
    full = _most([one.full for one in told])
    if some is None and machine is not None:
        some, full = machine.some, machine.full
    return msgspec.structs.replace(level, some=some, full=full)


def _most(shares: list[float | None]) -> float | None:
    return max([share for share in shares if share is not None], default=None)
