"""How the law sees a reading: whether it can be used, and which of the zones it lies in."""

from __future__ import annotations

import math
import sys
from enum import Enum
from typing import NamedTuple

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.pressure.reading import Reading


class Zone(Enum):
    """Where a reading lies against the thresholds."""

    ACUTE = "acute"
    """Memory is about to be gone: all tasks stand still, or headroom falls through its low line."""
    PRESSURE = "pressure"
    """Memory is short: stall at or above `high`, or headroom below its low line."""
    BETWEEN = "between"
    """Neither short nor quiet, or stalled for another reason than shortage."""
    QUIET = "quiet"
    """Stall below `low`, headroom not below its low line."""
    UNKNOWN = "unknown"
    """No stall known yet, and no shortage by headroom."""


class View(NamedTuple):
    """A usable reading, held against the thresholds."""

    time_s: float
    zone: Zone
    excess: float
    """How far past the threshold, 0 (just passed) to 1 (full stall, or no headroom at all)."""
    stall: float
    """Share of the time lost that is not the governor's own doing; 0 where it is not known."""
    headroom_bytes: int | None
    spare_bytes: int | None
    """Headroom above its low line; None where headroom is not known."""
    missing_bytes: int
    """What has to come back for the headroom to be at its low line in twice `lead_s`, as it falls now."""
    plenty: bool
    """Headroom is known, and far from its low line."""
    why: str
    """One clause with the figures."""


def flaw(reading: Reading, last_time_s: float) -> str:
    """Why a reading says nothing, or an empty string when it can be used."""
    if not math.isfinite(reading.time_s):
        return f"its time is {reading.time_s}"
    if reading.time_s < last_time_s:
        return f"time went back from {last_time_s:.3f} to {reading.time_s:.3f} s"
    ranges = (
        ("interval_s", reading.interval_s, 0.0, sys.float_info.max),
        ("some", reading.some, 0.0, 1.0),
        ("full", reading.full, 0.0, 1.0),
        ("own", reading.own, 0.0, 1.0),
        ("headroom_bytes", reading.headroom_bytes, 0, math.inf),
        ("limit_bytes", reading.limit_bytes, 1, math.inf),
        ("own_resident_bytes", reading.own_resident_bytes, 0, math.inf),
    )
    for name, value, least, most in ranges:
        if value is not None and not least <= value <= most:  # also refuses NaN
            return f"{name} is {value}"
    return ""


def view(config: GovernorConfig, reading: Reading, high: float, fall_bytes_per_s: float = 0.0) -> View:
    """Hold a usable reading against the thresholds, with `high` as it is now.

    `fall_bytes_per_s` (>= 0) is how fast headroom went down until this reading. Headroom counts only
    together with the limit that it is measured against. Stall counts only where the reading covers some time:
    the first of a source covers none. Of the time in which the governor itself was spilling or restoring
    (`reading.own`) all stall may be its own, so that much is taken off.
    """
    room = _room(config, reading, fall_bytes_per_s)
    known = reading.interval_s > 0.0
    some, full = (max(0.0, share - reading.own) if known else 0.0 for share in (reading.some, reading.full))
    stalled = known and some >= high
    drowning = known and full >= config.acute_full
    plenty = room is not None and room.share > config.headroom_plenty
    short = room is not None and room.ahead_bytes < room.line_bytes
    acute = (room is not None and room.going) or (drowning and not plenty)
    why = _figures(config, high, some if known else None, room)
    if drowning:
        why += f", all stand still for {full:.0%} of the time"
    if acute:
        zone = Zone.ACUTE
    elif short or (stalled and not plenty):
        zone = Zone.PRESSURE
    elif not known:
        zone, why = Zone.UNKNOWN, f"{why}, first reading of its source"
    else:
        zone = Zone.QUIET if some < config.low else Zone.BETWEEN
        if stalled:
            why += ": stall without shortage, trimming would not help"
    pressed = zone in {Zone.ACUTE, Zone.PRESSURE}
    return View(
        time_s=reading.time_s,
        zone=zone,
        excess=max(_excess(some, high), 0.0 if room is None else room.excess) if pressed else 0.0,
        stall=some,
        headroom_bytes=None if room is None else room.headroom_bytes,
        spare_bytes=None if room is None else max(0, room.headroom_bytes - room.line_bytes),
        missing_bytes=0 if room is None else room.missing_bytes,
        plenty=plenty,
        why=why,
    )


class _Room(NamedTuple):
    """The headroom of a reading, and where it is going."""

    headroom_bytes: int
    limit_bytes: int
    line_bytes: int
    fall_bytes_per_s: float
    ahead_bytes: float
    """What is left of it in `lead_s` if it goes on falling as it does."""

    @property
    def share(self) -> float:
        """Of the limit."""
        return min(1.0, self.headroom_bytes / self.limit_bytes)

    @property
    def going(self) -> bool:
        """Half of the line is gone or will be in `lead_s`, or is crossed by a fall that would take as much.

        One who takes memory at such a rate is not met by small steps.
        """
        half_bytes = self.line_bytes / 2
        fall_bytes = self.headroom_bytes - self.ahead_bytes
        return self.ahead_bytes < half_bytes or (
            self.ahead_bytes < self.line_bytes and fall_bytes >= half_bytes > 0
        )

    @property
    def excess(self) -> float:
        """How far under the line it is or will be, 0 to 1."""
        if self.line_bytes == 0 or self.ahead_bytes >= self.line_bytes:
            return 0.0
        return min(1.0, (self.line_bytes - self.ahead_bytes) / self.line_bytes)

    @property
    def missing_bytes(self) -> int:
        """See View."""
        fall_bytes = self.headroom_bytes - self.ahead_bytes
        return max(0, math.ceil(self.line_bytes - self.headroom_bytes + 2 * fall_bytes))


def _room(config: GovernorConfig, reading: Reading, fall_bytes_per_s: float) -> _Room | None:
    if reading.headroom_bytes is None or reading.limit_bytes is None:
        return None
    return _Room(
        headroom_bytes=reading.headroom_bytes,
        limit_bytes=reading.limit_bytes,
        line_bytes=math.ceil(config.headroom_low * reading.limit_bytes),
        fall_bytes_per_s=fall_bytes_per_s,
        ahead_bytes=reading.headroom_bytes - fall_bytes_per_s * config.lead_s,
    )


def _excess(stall: float, high: float) -> float:
    if stall < high:
        return 0.0
    return 1.0 if high >= 1.0 else (stall - high) / (1.0 - high)


def _figures(config: GovernorConfig, high: float, stall: float | None, room: _Room | None) -> str:
    parts = []
    if stall is None:
        parts.append("stall not known")
    elif stall >= high:
        parts.append(f"stall {stall:.0%} reached {high:.0%}")
    else:
        parts.append(f"stall {stall:.1%}")
    if room is not None:
        if room.headroom_bytes < room.line_bytes:
            parts.append(f"headroom {room.share:.1%} under {config.headroom_low:.0%} of the limit")
        elif room.share > config.headroom_plenty:
            parts.append(f"headroom {room.share:.0%} above {config.headroom_plenty:.0%} of the limit")
        else:
            parts.append(f"headroom {room.share:.1%} of the limit")
        if room.ahead_bytes < room.line_bytes and room.fall_bytes_per_s > 0.0:
            parts.append(f"falling by {room.fall_bytes_per_s / 1e6:.0f} MB/s")
    return ", ".join(parts)
