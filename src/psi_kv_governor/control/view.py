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
    spare_bytes: int | None
    """Headroom above its low line; None where headroom is not known."""
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
        ("headroom_bytes", reading.headroom_bytes, 0, math.inf),
        ("limit_bytes", reading.limit_bytes, 1, math.inf),
    )
    for name, value, least, most in ranges:
        if value is not None and not least <= value <= most:  # also refuses NaN
            return f"{name} is {value}"
    return ""


def view(config: GovernorConfig, reading: Reading) -> View:
    """Hold a usable reading against the thresholds.

    Headroom counts only together with the limit that it is measured against. Stall counts only where the
    reading covers some time: the first of a source covers none.
    """
    headroom, spare_bytes = _headroom(config, reading)
    stall = reading.some if reading.interval_s > 0.0 else None
    acute = headroom is not None and headroom < config.headroom_low
    plenty = headroom is not None and headroom > config.headroom_plenty
    stalled = stall is not None and stall >= config.high
    why = _figures(config, stall, headroom)
    if acute or (stalled and not plenty):
        excess = max(_stall_excess(config, stall), _headroom_excess(config, headroom))
        return View(reading.time_s, Zone.PRESSURE, excess, spare_bytes, why)
    if stall is None:
        return View(reading.time_s, Zone.UNKNOWN, 0.0, spare_bytes, f"{why}, first reading of its source")
    if stalled:
        why = f"{why}: stall without shortage, trimming would not help"
    zone = Zone.QUIET if stall < config.low else Zone.BETWEEN
    return View(reading.time_s, zone, 0.0, spare_bytes, why)


def _headroom(config: GovernorConfig, reading: Reading) -> tuple[float | None, int | None]:
    """Headroom as a share of the limit, and its bytes above the low line (not below 0)."""
    if reading.headroom_bytes is None or reading.limit_bytes is None:
        return None, None
    line_bytes = math.ceil(config.headroom_low * reading.limit_bytes)
    share = min(1.0, reading.headroom_bytes / reading.limit_bytes)
    return share, max(0, reading.headroom_bytes - line_bytes)


def _stall_excess(config: GovernorConfig, stall: float | None) -> float:
    if stall is None or stall < config.high:
        return 0.0
    return 1.0 if config.high >= 1.0 else (stall - config.high) / (1.0 - config.high)


def _headroom_excess(config: GovernorConfig, share: float | None) -> float:
    if share is None or share >= config.headroom_low:
        return 0.0
    return (config.headroom_low - share) / config.headroom_low


def _figures(config: GovernorConfig, stall: float | None, headroom: float | None) -> str:
    parts = []
    if stall is None:
        parts.append("stall not known")
    elif stall >= config.high:
        parts.append(f"stall {stall:.0%} reached {config.high:.0%}")
    else:
        parts.append(f"stall {stall:.1%}")
    if headroom is not None:
        if headroom < config.headroom_low:
            parts.append(f"headroom {headroom:.1%} under {config.headroom_low:.0%} of the limit")
        elif headroom > config.headroom_plenty:
            parts.append(f"headroom {headroom:.0%} above {config.headroom_plenty:.0%} of the limit")
        else:
            parts.append(f"headroom {headroom:.1%} of the limit")
    return ", ".join(parts)
