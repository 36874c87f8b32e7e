"""What the readings of the last second tell of a level: how its headroom falls, and how long it stalled."""

from __future__ import annotations

import math

import msgspec

from psi_kv_governor.control.view import STALL_WINDOW_S, Seen
from psi_kv_governor.pressure.reading import Level, Reading

FALL_WINDOW_S = 0.25
"""How long back the fall of the headroom is looked at: long enough to tell a process that takes memory from
the pages that one page-in brings, short enough that 250 MiB taken in 0.1 s are seen while they are taken."""

_LEAST_FALL_S = 0.015
"""Two looks closer together than this say nothing of a rate: the kernel charges in batches of pages."""


class Look(msgspec.Struct, frozen=True, array_like=True):
    """One reading as far as later ones are compared with it."""

    time_s: float
    covered_s: float
    """Time that its stall is of."""
    rooms: dict[str, int] = {}
    """By level: what all but the governed processes leave of the limit, in bytes."""
    stalls: dict[str, float] = {}


Looks = tuple[Look, ...]
"""Oldest first."""


def seen_before(looks: Looks, reading: Reading) -> dict[str, Seen]:
    """Of each level: how fast others take its headroom, and the time lost to stall in the last second."""
    return {
        level.name: Seen(_fall_bytes_per_s(looks, reading, level), _lost_s(looks, reading, level))
        for level in reading.levels
    }


def _lost_s(looks: Looks, reading: Reading, level: Level) -> float:
    if not level.some:
        return 0.0  # without stall now it does not matter how long it lasted
    lost_s = stalls_of(reading).get(level.name, 0.0) * passed_s(looks, reading)
    for look in looks:
        if reading.time_s - look.time_s < STALL_WINDOW_S:
            lost_s += look.stalls.get(level.name, 0.0) * look.covered_s
    return lost_s


def stalls_of(reading: Reading) -> dict[str, float]:
    """By level, the share of the time lost that is not a governor's own doing."""
    if reading.interval_s <= 0.0:
        return {}
    return {level.name: max(0.0, level.some - reading.own) for level in reading.levels if level.some}


def _fall_bytes_per_s(looks: Looks, reading: Reading, level: Level) -> float:
    """The steepest over the last quarter of a second.

    What the governed processes took or gave themselves (a context that fills, a restore, a trim) is no fall
    and no rise; where that is not told, nothing is while a governor is at work. And it has to fall twice in
    a row, by more than the count may be off: a burst of file pages moves it once, and back.
    """
    if level.headroom_bytes is None or (reading.own > 0.0 and reading.own_resident_bytes is None):
        return 0.0
    room = room_bytes(reading, level)
    if len(looks) < 2 or not room < _room_then(looks[-1], level) < _room_then(looks[-2], level):
        return 0.0
    past = [
        (look.time_s, look.rooms[level.name])
        for look in looks
        if reading.time_s - look.time_s <= FALL_WINDOW_S and level.name in look.rooms
    ]
    if len(past) < 2:
        return 0.0
    falls = (
        (n_bytes - room) / (reading.time_s - time_s)
        for time_s, n_bytes in past
        if reading.time_s - time_s >= _LEAST_FALL_S and n_bytes - room > level.grain_bytes
    )
    return max(0.0, max(falls, default=0.0))


def _room_then(look: Look, level: Level) -> int:
    return look.rooms.get(level.name, 0)


def room_bytes(reading: Reading, level: Level) -> int:
    """What all but the governed processes leave of the limit. File pages that somebody maps stay room."""
    neighbours = sum(one.resident_bytes for one in reading.neighbours if level.name in one.levels)
    return (level.headroom_bytes or 0) + level.mapped_bytes + (reading.own_resident_bytes or 0) + neighbours


def passed_s(looks: Looks, reading: Reading) -> float:
    """Time since the reading before, as far as this one covers it."""
    return min(reading.interval_s, max(0.0, reading.time_s - looks[-1].time_s if looks else math.inf))
