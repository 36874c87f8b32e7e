"""What the readings of the last second tell of a level: how its headroom falls, and how long it stalled."""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from psi_kv_governor.pressure.reading import Level, Reading

STALL_WINDOW_S = 1.0
"""A stall is pressure when half of `high` was lost over so long, beside the moment's own share. One of 12 ms
reads as 0.12 in its window of 0.1 s and is none; at full stall it takes 50 ms longer. lmkd wakes at 70 ms in
a second."""

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


def look_of(looks: Looks, reading: Reading) -> Look:
    """`reading` as later ones are compared with it."""
    rooms = {
        level.name: _room_bytes(reading, level)
        for level in reading.levels
        if level.headroom_bytes is not None
    }
    return Look(reading.time_s, _passed_s(looks, reading), rooms, _stalls_of(reading))


class Past(NamedTuple):
    """A reading, and those of the last second before it.

    What a level did is worked out where it is asked for: a calm one is asked for little.
    """

    looks: Looks
    reading: Reading
    look: Look
    """The reading itself."""

    def lost_s(self, level: Level) -> float:
        """The time lost to stall in the last STALL_WINDOW_S."""
        if not level.some:
            return 0.0  # without stall now it does not matter how long it lasted
        lost_s = self.look.stalls.get(level.name, 0.0) * self.look.covered_s
        for look in self.looks:
            if self.look.time_s - look.time_s < STALL_WINDOW_S:
                lost_s += look.stalls.get(level.name, 0.0) * look.covered_s
        return lost_s

    def fall_bytes_per_s(self, level: Level) -> float:
        """How fast others take its headroom: the steepest over the last quarter of a second.

        What the governed processes took or gave themselves (a context that fills, a restore, a trim) is no
        fall and no rise; where that is not told, nothing is while a governor is at work. And it has to fall
        twice in a row, by more than the count may be off: a burst of file pages moves it once, and back.
        """
        looks, reading, name = self.looks, self.reading, level.name
        room = self.look.rooms.get(name)
        if room is None or len(looks) < 2 or (reading.own > 0.0 and reading.own_resident_bytes is None):
            return 0.0
        if not room < looks[-1].rooms.get(name, 0) < looks[-2].rooms.get(name, 0):
            return 0.0
        past = [
            (look.time_s, look.rooms[name])
            for look in looks
            if reading.time_s - look.time_s <= FALL_WINDOW_S and name in look.rooms
        ]
        if len(past) < 2:
            return 0.0
        falls = (
            (n_bytes - room) / (reading.time_s - time_s)
            for time_s, n_bytes in past
            if reading.time_s - time_s >= _LEAST_FALL_S and n_bytes - room > level.grain_bytes
        )
        return max(0.0, max(falls, default=0.0))


def _stalls_of(reading: Reading) -> dict[str, float]:
    """By level, the share of the time lost that is not a governor's own doing."""
    if reading.interval_s <= 0.0:
        return {}
    return {level.name: max(0.0, level.some - reading.own) for level in reading.levels if level.some}


def _room_bytes(reading: Reading, level: Level) -> int:
    """What all but the governed processes leave of the limit. File pages that somebody maps stay room."""
    room_bytes = (level.headroom_bytes or 0) + level.mapped_bytes + (reading.own_resident_bytes or 0)
    for one in reading.neighbours:
        if level.name in one.levels:
            room_bytes += one.resident_bytes
    return room_bytes


def _passed_s(looks: Looks, reading: Reading) -> float:
    """Time since the reading before, as far as this one covers it."""
    return min(reading.interval_s, max(0.0, reading.time_s - looks[-1].time_s if looks else math.inf))
