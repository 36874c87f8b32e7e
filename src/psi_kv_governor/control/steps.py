"""How much one step takes: whole steps of the planner, or all that there is."""

from __future__ import annotations

import math

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control.decision import Action, CacheSnapshot, Decision, Mode
from psi_kv_governor.control.view import View


def nothing(mode: Mode, reason: str) -> Decision:
    """The decision to leave all as it is."""
    return Decision(action=Action.NONE, n_bytes=0, mode=mode, reason=reason)


def small_step(config: GovernorConfig, excess: float, cache: CacheSnapshot) -> int:
    """Between `step_min` and `step_max` of what can be given, by the excess (0 to 1)."""
    share = config.step_min + (config.step_max - config.step_min) * excess
    return whole_steps(max(1, math.ceil(share * cache.trimmable_bytes)), cache)


def acute_step(config: GovernorConfig, now: View, cache: CacheSnapshot, share: float) -> int:
    """One large step: what is missing now and soon at this rate, and at least `step_acute`. Of both, the
    `share` (0 to 1) that is this governor's."""
    least = math.ceil(max(config.step_acute * share, config.step_max) * cache.trimmable_bytes)
    return whole_steps(max(1, least, math.ceil(now.missing_bytes * share)), cache)


def whole_steps(n_bytes: int, cache: CacheSnapshot) -> int:
    """`n_bytes` rounded up to whole steps, and no more than there is."""
    step = max(1, cache.step_bytes)
    return min(-(-n_bytes // step) * step, cache.trimmable_bytes)
