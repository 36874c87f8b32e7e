"""A matrix of machines on paper: what the law does there in calm, and when a neighbour comes and goes.

`python tests/control/machines.py` prints the table of docs/control.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from paper import MIB, STEP_S, Governed

from psi_kv_governor.control import Action
from psi_kv_governor.pressure.reading import MACHINE, Level, Reading

GIB = 1 << 30
SECONDS = 600.0
COMES_S, GOES_S = 60.0, 240.0
SHORT_STALL_S = 0.012
"""A healthy machine waits for so long every 20 s."""


@dataclass(frozen=True)
class Limit:
    name: str
    bytes: int
    kind: str
    others_bytes: int
    """What is under it beside the caches and the neighbour."""


@dataclass(frozen=True)
class Machine:
    name: str
    limits: tuple[Limit, ...]
    """The nearest first; the neighbour is under all of them but the first `apart`."""
    cache_bytes: int
    taken_bytes: int
    """What the neighbour takes, at 200 MB/s."""
    caches: int = 1
    swap_bytes: int = 0
    psi: bool = True
    apart: int = 0


def whole(total_bytes: int, others_bytes: int) -> tuple[Limit, ...]:
    return (Limit(MACHINE, total_bytes, "MemAvailable", others_bytes),)


HOST = whole(128 * GIB, 60 * GIB)
BOARD = whole(8 * GIB, 5632 * MIB)
MACHINES = (
    Machine("512 MB board", whole(512 * MIB, 250 * MIB), 96 * MIB, 190 * MIB),
    Machine("8 GB board", BOARD, GIB, 2000 * MIB),
    Machine("16 GB laptop with zram", whole(16 * GIB, 10 * GIB), 2 * GIB, 5 * GIB, swap_bytes=8 * GIB),
    Machine("128 GB server", whole(128 * GIB, 90 * GIB), 16 * GIB, 26 * GIB),
    Machine(
        "container of 512 MB on a 128 GB host",
        (Limit("/pod", 512 * MIB, "memory.max", 200 * MIB), *HOST),
        150 * MIB,
        210 * MIB,
    ),
    Machine(
        "`memory.high` of 512 MB",
        (Limit("/pod", 512 * MIB, "memory.high", 200 * MIB), *HOST),
        150 * MIB,
        210 * MIB,
        swap_bytes=GIB,
    ),
    Machine(
        "slice of 2 GB with siblings",
        (
            Limit("/slice/pod", GIB, "memory.max", 200 * MIB),
            Limit("/slice", 2 * GIB, "memory.max", 700 * MIB),
            *HOST,
        ),
        512 * MIB,
        950 * MIB,
        apart=1,
    ),
    Machine("8 GB without PSI", BOARD, GIB, 2000 * MIB, psi=False),
    *(
        Machine(
            f"{n} governed processes on 8 GB",
            whole(8 * GIB, 7 * GIB - n * 512 * MIB),
            512 * MIB,
            1200 * MIB,
            n,
        )
        for n in (2, 4, 8)
    ),
)


@dataclass(frozen=True)
class Outcome:
    trims: int
    restores: int
    given_bytes: int
    lost_s: float
    killed: bool
    away_bytes: int


@functools.cache  # the tests of single machines and the one of the table ask for the same runs
def run(machine: Machine, *, pressed: bool, governed: bool) -> Outcome:
    n = machine.caches
    caches = [Governed(f"p{i}", machine.cache_bytes, jitter=i / n) for i in range(n)]
    for i, one in enumerate(caches):
        one.last_used_s = float(i)
    lost_s = dict.fromkeys((limit.name for limit in machine.limits), 0.0)
    told_s = [dict(lost_s) for _ in caches]
    now: _Now | None = None
    soonest_s = 0.0 if governed else math.inf
    for step in range(round(SECONDS / STEP_S)):
        time_s = step * STEP_S
        taken = _taken_bytes(machine, time_s) if pressed else 0
        if now is None or now.taken_bytes != taken:
            now = _now(machine, caches, taken)
        noise = time_s % 20.0 < SHORT_STALL_S
        for name in lost_s if noise else now.shares:
            lost_s[name] += STEP_S * (1.0 if noise else now.shares[name])
        if now.killed:
            break
        if time_s < soonest_s - 1e-6:
            continue
        used = now.used
        for one, before in zip(caches, told_s, strict=True):
            if time_s >= one.next_s - 1e-9 and time_s - one.last_s >= 0.1 - 1e-9:
                _turn(machine, one, caches, (time_s, used, lost_s, before))
                now = None
        soonest_s = min(max(one.next_s, one.last_s + 0.1) for one in caches)
    killed = now is not None and now.killed
    return Outcome(
        trims=sum(one.count(Action.TRIM) for one in caches),
        restores=sum(one.count(Action.RESTORE) for one in caches),
        given_bytes=sum(size for one in caches for _, done, size in one.acts if done is Action.TRIM),
        lost_s=max(lost_s.values()),
        killed=killed,
        away_bytes=sum(one.masked_bytes for one in caches),
    )


class _Now(NamedTuple):
    """What follows from what everybody holds."""

    taken_bytes: int
    used: dict[str, int]
    """Bytes in use under each limit."""
    shares: dict[str, float]
    """Of the time that is lost there, for each limit that is nearly met."""
    killed: bool
    """More is in use than one of them can hold."""


def _now(machine: Machine, caches: list[Governed], taken_bytes: int) -> _Now:
    live, used, shares, killed = sum(one.live_bytes for one in caches), {}, {}, False
    for at, limit in enumerate(machine.limits):
        used[limit.name] = limit.others_bytes + live + (taken_bytes if at >= machine.apart else 0)
        over = used[limit.name] / limit.bytes - 0.97
        if over > 0.0:
            shares[limit.name] = 1.0 - math.exp(-over / 0.06)
        killed = killed or used[limit.name] > limit.bytes + machine.swap_bytes
    return _Now(taken_bytes, used, shares, killed)


def _taken_bytes(machine: Machine, time_s: float) -> int:
    """What the neighbour holds."""
    return min(machine.taken_bytes, int(200e6 * (time_s - COMES_S))) if COMES_S <= time_s < GOES_S else 0


def _turn(machine: Machine, one: Governed, caches: list[Governed], seen: tuple) -> None:
    time_s, used, lost_s, before = seen
    interval_s = time_s - one.last_s
    levels = []
    for limit in machine.limits:
        some = min(1.0, max(0.0, (lost_s[limit.name] - before[limit.name]) / interval_s))
        before[limit.name] = lost_s[limit.name]
        levels.append(
            Level(
                name=limit.name,
                some=some if machine.psi else None,
                full=some / 2 if machine.psi else None,
                headroom_bytes=max(0, limit.bytes - used[limit.name]),
                limit_bytes=limit.bytes,
                limit=limit.kind,
                bites=used[limit.name] > 0.97 * limit.bytes,
            )
        )
    one.last_s = time_s
    one.turn(
        Reading(
            time_s=time_s,
            interval_s=interval_s,
            levels=tuple(levels),
            own_resident_bytes=one.live_bytes,
            neighbours=tuple(other.neighbour() for other in caches if other is not one),
        )
    )


def table(told: Callable[[str], object] = print) -> None:
    told(
        "| machine | calm | killed: without, with | lost: without, with "
        "| trims, restores | given up | away at the end |"
    )
    told("| --- | --- | --- | --- | --- | --- | --- |")
    for machine in MACHINES:
        calm = run(machine, pressed=False, governed=True)
        plain = run(machine, pressed=True, governed=False)
        with_it = run(machine, pressed=True, governed=True)
        yes = {True: "yes", False: "no"}
        lost = ["all" if one.killed else f"{one.lost_s:.1f} s" for one in (plain, with_it)]
        told(
            f"| {machine.name} | {calm.trims + calm.restores} | {yes[plain.killed]}, {yes[with_it.killed]} "
            f"| {lost[0]}, {lost[1]} | {with_it.trims}, {with_it.restores} "
            f"| {with_it.given_bytes // MIB:,} MiB | {with_it.away_bytes // MIB:,} MiB |"
        )


if __name__ == "__main__":
    table()
