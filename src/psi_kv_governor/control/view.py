"""How the law sees a reading: whether it can be used, and which of the zones its levels lie in."""

from __future__ import annotations

import math
import sys
from enum import Enum
from typing import NamedTuple

import msgspec

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control.past import STALL_WINDOW_S, Past
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
PRESSED = (Zone.ACUTE, Zone.PRESSURE)


class Thresholds(NamedTuple):
    """The stall thresholds as they are now: both follow the machine's own noise."""

    low: float
    high: float


class View(msgspec.Struct, frozen=True, kw_only=True):
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
    if not 0.0 <= reading.interval_s <= sys.float_info.max:  # this and all that follow also refuse NaN
        return f"interval_s is {reading.interval_s}"
    if not 0.0 <= reading.own <= 1.0:
        return f"own is {reading.own}"
    if reading.own_resident_bytes is not None and not reading.own_resident_bytes >= 0:
        return f"own_resident_bytes is {reading.own_resident_bytes}"
    return next(filter(None, map(_flaw_of, reading.levels)), "")


def _flaw_of(level: Level) -> str:
    why = ""
    if level.some is not None and not 0.0 <= level.some <= 1.0:
        why = f"some is {level.some}"
    elif level.full is not None and not 0.0 <= level.full <= 1.0:
        why = f"full is {level.full}"
    elif level.headroom_bytes is not None and not level.headroom_bytes >= 0:
        why = f"headroom_bytes is {level.headroom_bytes}"
    elif level.limit_bytes is not None and not level.limit_bytes >= 1:
        why = f"limit_bytes is {level.limit_bytes}"
    elif not level.mapped_bytes >= 0:
        why = f"mapped_bytes is {level.mapped_bytes}"
    elif not level.refault_bytes_per_s >= 0.0:
        why = f"refault_bytes_per_s is {level.refault_bytes_per_s}"
    elif not level.grain_bytes >= 0:
        why = f"grain_bytes is {level.grain_bytes}"
    return why


def view(config: GovernorConfig, thresholds: Thresholds, past: Past) -> View:
    """Hold every level of a usable reading (of `levels.limited`) against the thresholds; the worst decides.

    Headroom counts only together with the limit that it is measured against. Stall counts only where the
    reading covers some time: the first of a source covers none. Of the time in which a governor was parking
    or restoring (`reading.own`) all stall may be its own, so that much is taken off.
    """
    judged = [_judged(config, level, thresholds, past) for level in past.reading.levels]
    worst, noise, missing_bytes, near = judged[0], 0.0, 0, False
    spares, plenty = [], True
    for one in judged:
        if one.rank > worst.rank or (one.rank == worst.rank and one.excess > worst.excess):
            worst = one
        noise = max(noise, one.some)
        if one.room is not None:
            spares.append(one.room.spare_bytes)
            missing_bytes = max(missing_bytes, one.room.missing_bytes)
            plenty, near = plenty and one.room.plenty, near or one.room.near
    room, pressed = worst.room, worst.zone in PRESSED
    met = room is not None and (room.short or room.going)
    return View(
        time_s=past.reading.time_s,
        level=worst.level.name,
        zone=worst.zone,
        excess=worst.excess if pressed else 0.0,
        stall=worst.some,
        stalled=pressed and (worst.stalled or worst.drowning) and not met,
        headroom_bytes=None if room is None else room.headroom_bytes,
        spare_bytes=min(spares, default=None),
        missing_bytes=missing_bytes,
        plenty=plenty and bool(spares),
        near=near,
        noise=noise,
        why=_why(worst, thresholds.high),
    )


class _Judged(msgspec.Struct, frozen=True):
    """One level by itself."""

    level: Level
    zone: Zone
    rank: int
    """How bad the zone is."""
    excess: float
    known: bool
    """Whether stall is told."""
    some: float
    full: float
    stalled: bool
    drowning: bool
    room: Room | None


def _judged(config: GovernorConfig, level: Level, thresholds: Thresholds, past: Past) -> _Judged:
    reading = past.reading
    known, some, full = reading.interval_s > 0.0 and level.some is not None, 0.0, 0.0
    if known:
        some = max(0.0, (level.some or 0.0) - reading.own)
        full = max(0.0, (level.full or 0.0) - reading.own)
    room = room_of(config, reading, level, past.fall_bytes_per_s(level), calm=some < thresholds.low)
    stalled, drowning = known and some >= thresholds.high, known and full >= config.acute_full
    if (stalled or drowning) and not past.lost_s(level) >= thresholds.high * STALL_WINDOW_S / 2:
        stalled = drowning = False
    plenty = room is not None and room.plenty
    if (room is not None and room.going) or (drowning and not plenty):
        zone = Zone.ACUTE
    elif (room is not None and room.short) or (stalled and not plenty):
        zone = Zone.PRESSURE
    elif reading.interval_s <= 0.0 or (not known and room is None):
        zone = Zone.UNKNOWN
    elif not known:
        zone = Zone.QUIET  # no PSI: headroom alone says that there is room
    elif stalled:
        zone = Zone.BETWEEN
    else:
        zone = Zone.QUIET if some < (thresholds.high if plenty else thresholds.low) else Zone.BETWEEN
    excess = _excess(some, thresholds.high)
    if room is not None and room.excess > excess:
        excess = room.excess
    return _Judged(level, zone, _ORDER.index(zone), excess, known, some, full, stalled, drowning, room)


def _excess(stall: float, high: float) -> float:
    if stall < high:
        return 0.0
    return 1.0 if high >= 1.0 else (stall - high) / (1.0 - high)


def _why(one: _Judged, high: float) -> str:
    """One clause with the figures."""
    if not one.known:
        why = "stall not known"
    elif one.stalled:
        why = f"stall {one.some:.0%} reached {high:.0%}"
    else:
        why = f"stall {one.some:.1%}"
    if one.room is not None:
        why += f", {one.room.figures}"
    if one.drowning:
        why += f", all stand still for {one.full:.0%} of the time"
    if one.zone is Zone.UNKNOWN:
        why += ", first reading of its source"
    elif one.zone is Zone.BETWEEN and one.stalled:
        why += ": stall without shortage, trimming would not help"
    of = f" at {one.level.limit}" if one.level.limit else ""
    return f"{one.level.name}{of}: {why}"
