"""How the law sees a reading: whether it can be used, and which of the zones its levels lie in."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control.room import Room, room_of
from psi_kv_governor.pressure.reading import Level, Reading


class Zone(Enum):
    """Where a level lies against the thresholds."""

    ACUTE = "acute"
    """Memory is about to be gone: all tasks stand still, or headroom falls through its low line."""
    PRESSURE = "pressure"
    """Memory is short: stall at or above `high`, or headroom below its low line."""
    BETWEEN = "between"
    """Neither short nor quiet, or stalled for another reason than shortage."""
    QUIET = "quiet"
    """Stall below `low` (with plenty of headroom: below `high`) or not told here, and headroom not below its
    low line."""
    UNKNOWN = "unknown"
    """No stall known yet, or neither stall nor headroom told."""


_ORDER = (Zone.QUIET, Zone.UNKNOWN, Zone.BETWEEN, Zone.PRESSURE, Zone.ACUTE)
PRESSED = frozenset({Zone.ACUTE, Zone.PRESSURE})

STALL_WINDOW_S = 1.0
"""A stall is pressure when half of `high` was lost over so long, beside the moment's own share. One of 12 ms
reads as 0.12 in its window of 0.1 s and is none; at full stall it takes 50 ms longer. lmkd wakes at 70 ms in
a second."""


class Seen(NamedTuple):
    """What the readings before tell of one level."""

    fall_bytes_per_s: float = 0.0
    """How fast others take its headroom."""
    lost_s: float = 0.0
    """Time lost to stall in the last STALL_WINDOW_S."""


class Thresholds(NamedTuple):
    """The stall thresholds as they are now: both follow the machine's own noise."""

    low: float
    high: float


class View(NamedTuple):
    """A usable reading, held against the thresholds. What is not said to be of all levels is of the worst."""

    time_s: float
    level: str
    """Name of the worst level."""
    zone: Zone
    excess: float
    """How far past the threshold, 0 (just passed) to 1 (full stall, or no headroom at all)."""
    stall: float
    """Share of the time lost that is not a governor's own doing; 0 where it is not known."""
    stalled: bool
    """Pressed by stall, and not by headroom: only less stall is relief."""
    headroom_bytes: int | None
    spare_bytes: int | None
    """Least headroom above its low line of all levels; None where no headroom is known."""
    missing_bytes: int
    """What has to come back for the headroom to be at its low line in twice `lead_s`, as it falls now."""
    plenty: bool
    """Headroom is known, and far from its low line, on all levels."""
    near: bool
    """On some level, headroom is within one and a half times its low line."""
    noise: float
    """The most stall of any level."""
    why: str
    """One clause with the figures."""


def flaw(reading: Reading, last_time_s: float) -> str:
    """Why a reading says nothing, or an empty string when it can be used."""
    if not math.isfinite(reading.time_s):
        return f"its time is {reading.time_s}"
    if reading.time_s < last_time_s:
        return f"time went back from {last_time_s:.3f} to {reading.time_s:.3f} s"
    ranges: list[tuple[str, float | None, float, float]] = [
        ("interval_s", reading.interval_s, 0.0, sys.float_info.max),
        ("own", reading.own, 0.0, 1.0),
        ("own_resident_bytes", reading.own_resident_bytes, 0, math.inf),
    ]
    for level in reading.levels:
        ranges += [
            ("some", level.some, 0.0, 1.0),
            ("full", level.full, 0.0, 1.0),
            ("headroom_bytes", level.headroom_bytes, 0, math.inf),
            ("limit_bytes", level.limit_bytes, 1, math.inf),
            ("mapped_bytes", level.mapped_bytes, 0, math.inf),
            ("refault_bytes_per_s", level.refault_bytes_per_s, 0, math.inf),
            ("grain_bytes", level.grain_bytes, 0, math.inf),
        ]
    for name, value, least, most in ranges:
        if value is not None and not least <= value <= most:  # also refuses NaN
            return f"{name} is {value}"
    return ""


def view(
    config: GovernorConfig, reading: Reading, thresholds: Thresholds, before: Mapping[str, Seen] | None = None
) -> View:
    """Hold every level of a usable reading (of `levels.limited`) against the thresholds; the worst decides.

    Headroom counts only together with the limit that it is measured against. Stall counts only where the
    reading covers some time: the first of a source covers none. Of the time in which a governor was parking
    or restoring (`reading.own`) all stall may be its own, so that much is taken off.
    """
    before = {} if before is None else before
    judged = [
        _judged(config, reading, level, thresholds, before.get(level.name, Seen()))
        for level in reading.levels
    ]
    worst = max(judged, key=lambda one: (_ORDER.index(one.zone), one.excess))
    known = [one.room for one in judged if one.room is not None]
    pressed = worst.zone in PRESSED
    room = worst.room
    return View(
        time_s=reading.time_s,
        level=worst.name,
        zone=worst.zone,
        excess=worst.excess if pressed else 0.0,
        stall=worst.some,
        stalled=pressed and worst.stalled and not (room is not None and (room.short or room.going)),
        headroom_bytes=None if room is None else room.headroom_bytes,
        spare_bytes=min((one.spare_bytes for one in known), default=None),
        missing_bytes=max((one.missing_bytes for one in known), default=0),
        plenty=bool(known) and all(one.plenty for one in known),
        near=any(one.near for one in known),
        noise=max(one.some for one in judged),
        why=worst.why,
    )


class _Judged(NamedTuple):
    """One level by itself."""

    name: str
    zone: Zone
    excess: float
    some: float
    stalled: bool
    room: Room | None
    why: str


def _judged(
    config: GovernorConfig, reading: Reading, level: Level, thresholds: Thresholds, before: Seen
) -> _Judged:
    known = reading.interval_s > 0.0 and level.some is not None
    some = max(0.0, (level.some or 0.0) - reading.own) if known else 0.0
    full = max(0.0, (level.full or 0.0) - reading.own) if known else 0.0
    room = room_of(config, reading, level, before.fall_bytes_per_s, calm=some < thresholds.low)
    lasting = before.lost_s >= thresholds.high * STALL_WINDOW_S / 2
    stalled = known and some >= thresholds.high and lasting
    drowning = known and full >= config.acute_full and lasting
    plenty = room is not None and room.plenty
    why = _figures(level, thresholds.high, some if known else None, room, stalled=stalled)
    if drowning:
        why += f", all stand still for {full:.0%} of the time"
    if (room is not None and room.going) or (drowning and not plenty):
        zone = Zone.ACUTE
    elif (room is not None and room.short) or (stalled and not plenty):
        zone = Zone.PRESSURE
    elif reading.interval_s <= 0.0 or (not known and room is None):
        zone, why = Zone.UNKNOWN, f"{why}, first reading of its source"
    elif not known:
        zone = Zone.QUIET  # no PSI: headroom alone says that there is room
    elif stalled:
        zone, why = Zone.BETWEEN, f"{why}: stall without shortage, trimming would not help"
    else:
        zone = Zone.QUIET if some < (thresholds.high if plenty else thresholds.low) else Zone.BETWEEN
    excess = max(_excess(some, thresholds.high), 0.0 if room is None else room.excess)
    return _Judged(level.name, zone, excess, some, stalled or drowning, room, why)


def _excess(stall: float, high: float) -> float:
    if stall < high:
        return 0.0
    return 1.0 if high >= 1.0 else (stall - high) / (1.0 - high)


def _figures(level: Level, high: float, stall: float | None, room: Room | None, *, stalled: bool) -> str:
    parts = []
    if stall is None:
        parts.append("stall not known")
    elif stalled:
        parts.append(f"stall {stall:.0%} reached {high:.0%}")
    else:
        parts.append(f"stall {stall:.1%}")
    if room is not None:
        parts.append(room.figures)
    of = f" at {level.limit}" if level.limit else ""
    return f"{level.name}{of}: {', '.join(parts)}"
