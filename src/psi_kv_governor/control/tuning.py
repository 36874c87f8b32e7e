"""Thresholds for one machine, out of what it was seen to do: readings in, proposals with their reasons out.

Two things are done. The stall thresholds are put above the noise of the calm machine. Then the two settings
by which falling headroom is judged are searched: those under which the law gives the fewest false alarms on
the calm machine, and answers a neighbour in time: before memory is short, or no later than before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import msgspec

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control.decision import CacheSnapshot
from psi_kv_governor.control.trials import Trial, due, false_trims, late, reactions_s, try_out
from psi_kv_governor.pressure.reading import Reading
from psi_kv_governor.quantile import quantile

NOISE_QUANTILE = 0.999
"""Stall that a calm machine passes once in a thousand looks (100 s at ten a second) is still its noise."""

NOISE_MARGIN = 0.05
"""So far above it the high threshold lies. The bursts of a compiler and file copies in a cgroup of 130 MiB
reached 0.53 in one half of a recording and 0.50 in the other."""

LEAST_HIGH = 0.07
"""lmkd wakes at 70 ms in a second: less is not felt, however silent the machine is."""

QUIET_QUANTILE = 0.95
QUIET_MARGIN = 0.01
LEAST_LOW = 0.02
"""Less would only put off what comes back."""

MOST_QUIET_S = 30.0
MOST_STEP = 0.5

_LEADS = (1.0, 0.5, 0.25, 0.1, 0.0)
_LINES = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 0.5)
"""Multiples of `lead_s` and `headroom_low` that are tried. A smaller lead is answered by a higher line."""


class Proposal(msgspec.Struct, frozen=True, kw_only=True):
    """One setting, and why."""

    key: str
    value: float
    reason: str


class Tuning(msgspec.Struct, frozen=True, kw_only=True):
    """What is proposed, and what it is worth on the readings that it was found with."""

    config: GovernorConfig
    proposals: tuple[Proposal, ...]
    before: Trial
    after: Trial
    remarks: tuple[str, ...] = ()


def tune(
    calm: Sequence[Reading],
    scenes: Sequence[Sequence[Reading]],
    base: GovernorConfig,
    cache: CacheSnapshot,
) -> Tuning:
    """Fit `base` to a machine.

    `calm` is what it reads while nothing is wrong; each of `scenes` begins when a neighbour comes that takes
    memory (none where no scene could be played); `cache` is what the law has to give. Any readings give a
    configuration that is valid; those that cover no time are left out.
    """
    calm = [reading for reading in calm if reading.interval_s > 0.0]
    stall = _Stall(calm)
    values: dict[str, tuple[float, str]] = {}
    if calm:
        values |= _thresholds(stall, base)
        values |= _quiet(calm, values["low"][0], base)
    rate = max((_fastest_fall(scene) for scene in scenes), default=0.0)
    if rate > 0.0:
        values |= _pace(calm, rate, base, cache)
    fitted = _changed(base, {key: value for key, (value, _) in values.items()})
    before = try_out(base, calm, scenes, cache)
    due_s = due(base, before, scenes)
    config, after = _search(fitted, due_s, calm, scenes, cache)
    for key in ("lead_s", "headroom_low"):
        if getattr(config, key) != getattr(base, key):
            values[key] = (getattr(config, key), _told(before, after))
    proposals = tuple(
        Proposal(key=key, value=value, reason=reason)
        for key, (value, reason) in values.items()
        if value != getattr(base, key)
    )
    found = Tuning(config=config, proposals=proposals, before=before, after=after)
    remarks = _remarks(calm, stall, base, found, too_late=late(after, due_s))
    return msgspec.structs.replace(found, remarks=tuple(remarks))


def _quantile(values: Sequence[float], share: float) -> float:
    """As `quantile`; 0 without values, since a machine that said nothing showed no stall."""
    return quantile(values, share) if values else 0.0


# -- stall -------------------------------------------------------------------------------------------------


class _Stall:
    """The noise of the calm machine."""

    def __init__(self, calm: Sequence[Reading]) -> None:
        some = [reading.some for reading in calm]
        self.median = _quantile(some, 0.5)
        self.usual = _quantile(some, QUIET_QUANTILE)
        self.noise = _quantile(some, NOISE_QUANTILE)
        self.noise_full = _quantile([reading.full for reading in calm], NOISE_QUANTILE)


def _thresholds(stall: _Stall, base: GovernorConfig) -> dict[str, tuple[float, str]]:
    high = max(LEAST_HIGH, _up(stall.noise + NOISE_MARGIN))
    low = min(max(LEAST_LOW, _up(stall.usual + QUIET_MARGIN)), _down(high / 2))
    seen = f"{NOISE_QUANTILE:.1%} of the calm looks"
    acute = max(base.acute_full, _up(stall.noise_full + NOISE_MARGIN))
    return {
        "high": (high, f"{seen} showed a stall of {stall.noise:.1%} or less; {NOISE_MARGIN:.0%} are added"),
        "low": (low, f"{QUIET_QUANTILE:.0%} of them showed {stall.usual:.1%} or less"),
        "high_max": (max(base.high_max, high), "not under high"),
        "acute_full": (acute, f"{seen} showed all tasks waiting {stall.noise_full:.1%} of the time or less"),
    }


def _quiet(calm: Sequence[Reading], low: float, base: GovernorConfig) -> dict[str, tuple[float, str]]:
    """Longer than the usual pause between two bursts: what comes back in it would soon go again."""
    bursts_s = [reading.time_s for reading in calm if reading.some >= low]
    pauses_s = [b - a for a, b in pairwise(bursts_s) if b - a > 2 * base.poll_s]
    if not pauses_s:
        return {}
    pause_s = _quantile(pauses_s, 0.9)
    quiet_s = min(max(base.quiet_s, _up(1.2 * pause_s, 1)), max(MOST_QUIET_S, base.quiet_s))
    return {"quiet_s": (quiet_s, f"9 of 10 pauses between two bursts of stall took {pause_s:.1f} s or less")}


# -- pace --------------------------------------------------------------------------------------------------


def _fastest_fall(scene: Sequence[Reading]) -> float:
    """Bytes a second: most that the headroom lost between two looks at least 15 ms apart."""
    known = [(one.time_s, one.headroom_bytes) for one in scene if one.headroom_bytes is not None]
    return max(((a - b) / (t - s) for (s, a), (t, b) in pairwise(known) if t - s >= 0.015), default=0.0)


def _pace(
    calm: Sequence[Reading], rate: float, base: GovernorConfig, cache: CacheSnapshot
) -> dict[str, tuple[float, str]]:
    """How often to look, and how much to give, for a neighbour who takes `rate` bytes a second."""
    values = {}
    took = f"the neighbour of the scene took {rate / 1e6:,.0f} MB/s at its fastest"
    rooms = [reading.headroom_bytes for reading in calm if reading.headroom_bytes is not None]
    if rooms:
        left_s = _quantile(rooms, 0.5) / rate
        poll_s = min(base.poll_s, max(base.poll_busy_s, _down(left_s / 4)))
        values["poll_s"] = (poll_s, f"{took}: this machine's headroom would last {left_s:.2f} s")
    if cache.trimmable_bytes:
        share = min(MOST_STEP, _up(rate * base.cooldown_s / cache.trimmable_bytes, 2))
        step_max = max(base.step_max, share)
        values["step_max"] = (step_max, f"{took}, {share:.0%} of what may go (at most) between two trims")
    return values


# -- headroom ----------------------------------------------------------------------------------------------


def _search(
    fitted: GovernorConfig,
    due_s: Sequence[float],
    calm: Sequence[Reading],
    scenes: Sequence[Sequence[Reading]],
    cache: CacheSnapshot,
) -> tuple[GovernorConfig, Trial]:
    """The best candidate: in time, then with the fewest false alarms, then least changed.

    Scenes are short and the calm time is long: a candidate that is late where another is not is not tried on
    the calm time, and no other for longer than until it has raised as many alarms as the best.
    """
    best: tuple[GovernorConfig, Trial] | None = None
    for config in dict.fromkeys(_candidates(fitted, bool(scenes))):
        trial = Trial(0, reactions_s(config, scenes, cache))
        most: int | None = None
        in_time = not late(trial, due_s)
        if best is not None and in_time is not late(best[1], due_s):
            most = best[1].false_trims
        elif best is not None and not in_time:
            continue
        trial = trial._replace(false_trims=false_trims(config, calm, cache, most))
        if most is None or trial.false_trims < most:
            best = config, trial
    assert best is not None  # there always is a candidate
    return best


def _candidates(fitted: GovernorConfig, with_scene: bool) -> Iterator[GovernorConfig]:
    """Itself first, then ever farther from it. Without a scene nothing is tried that might answer later."""
    lines = _LINES if with_scene else _LINES[:1]
    leads = _LEADS if with_scene else _LEADS[:1]
    for line in lines:
        for lead in leads:
            headroom_low = min(round(fitted.headroom_low * line, 4), fitted.headroom_plenty)
            yield _changed(fitted, {"lead_s": round(fitted.lead_s * lead, 4), "headroom_low": headroom_low})


# -- words -------------------------------------------------------------------------------------------------


def _told(before: Trial, after: Trial) -> str:
    told = f"{after.false_trims} false alarms on the calm machine instead of {before.false_trims}"
    if not after.reactions_s:
        return told
    return f"{told}; the first trims of the scene after {_seconds(after)} instead of {_seconds(before)}"


def _seconds(trial: Trial) -> str:
    return " and ".join("never" if s is None else f"{s:.2f} s" for s in trial.reactions_s)


def _remarks(
    calm: Sequence[Reading], stall: _Stall, base: GovernorConfig, found: Tuning, *, too_late: bool
) -> Iterator[str]:
    if not calm:
        yield "no reading of the calm machine covers any time: nothing was learned of its stall"
    if stall.median >= base.high:
        yield f"the machine was not calm: half of the looks showed a stall of {stall.median:.0%} or more"
    if found.config.high >= 0.5:
        yield "stall alone says little on this machine: its noise is as high; headroom decides"
    if found.after.false_trims:
        yield f"{found.after.false_trims} false alarms are left: this machine's headroom falls by itself"
    if too_late:
        yield "the scene is answered later than before: nothing that is above the noise was as quick"


def _changed(config: GovernorConfig, values: dict[str, float]) -> GovernorConfig:
    settings: dict[str, Any] = {**msgspec.structs.asdict(config), **values}
    return GovernorConfig(**settings)


def _up(value: float, digits: int = 3) -> float:
    """Rounded up to a number that is easy to read, and not above 1 where it is a share."""
    scale = 10.0**digits
    rounded = math.ceil(value * scale - 1e-9) / scale
    return min(1.0, rounded) if digits >= 2 else rounded


def _down(value: float) -> float:
    return math.floor(value * 1000) / 1000
