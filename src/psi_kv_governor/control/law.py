"""The law: a reading and a snapshot in, a decision out. No I/O and no clock, so a trace replays exactly."""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from psi_kv_governor.amounts import mib
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control.decision import Action, CacheSnapshot, Decision, Mode
from psi_kv_governor.control.levels import limited
from psi_kv_governor.control.order import Order, order_of
from psi_kv_governor.control.past import Past, look_of
from psi_kv_governor.control.restoring import slice_pause_s, when_quiet
from psi_kv_governor.control.room import line_bytes, spare_bytes
from psi_kv_governor.control.state import (
    BUDGET_WINDOW_S,
    SETTLE_S,
    LawState,
    futile_by_now,
    seen,
    thresholds_of,
    trimmed,
)
from psi_kv_governor.control.steps import acute_step, nothing, small_step, whole_steps
from psi_kv_governor.control.view import View, Zone, flaw, view
from psi_kv_governor.pressure.reading import Reading

FASTEST_BYTES_PER_S = 2.5e9
"""What a process can take at the most, as measured (250 MiB in 0.1 s): the kernel clears each page first."""

_NOTHING_LEFT_S = 1.0
"""Pause while nothing can be given: a turn in cold caches takes 0.5 ms, so twenty a second would cost a
hundredth of a core for nothing, and one a second costs 0.05 %."""


def decide(
    config: GovernorConfig,
    state: LawState,
    reading: Reading,
    cache: CacheSnapshot,
    cache_limit: float | None = None,
) -> tuple[Decision, LawState]:
    """What to do now, and what to remember for the next reading.

    `cache_limit` (0 to 1, checked where it is set) is the share of the context that may stay live while
    the machine is under pressure: the caches are brought to it in one trim, which only the budget and the
    cooldown hold back. Restores need no such cap: they begin when pressure is over.

    The bytes of a TRIM are whole steps, or all that is trimmable. Those of a RESTORE are carried out in
    slices with a reading between: the next quiet reading goes on with it, any other ends it.
    """
    wrong = flaw(reading, state.time_s)
    if wrong:
        # Doubt never restores: the run of quiet readings is broken, everything else stays.
        doubt = msgspec.structs.replace(state, quiet_since_s=None, run_bytes=0)
        return nothing(state.mode, f"reading not used: {wrong}"), doubt
    reading = limited(reading)
    past = Past(state.looks, reading, look_of(state.looks, reading))
    now = view(config, thresholds_of(config, state), past)
    state = seen(state, past, now)
    order = order_of(reading, now, cache)
    if now.zone is Zone.ACUTE or now.zone is Zone.PRESSURE:
        decision, state = _under_pressure(config, state, _Given(now, cache, order, cache_limit))
    elif now.zone is Zone.BETWEEN:
        decision = nothing(Mode.WATCHING, now.why)
    elif now.zone is Zone.UNKNOWN:
        decision = nothing(state.mode, now.why)
    else:
        decision, state = when_quiet(config, state, now, cache, order)
    mode = _settled(state, decision.mode)
    # Not on a calm machine with less than plenty: every token that is decoded would be written, 18 GB an hour
    # of an 8B model's, for a neighbour that may never come.
    behind = now.zone is not Zone.UNKNOWN and (now.near or (not now.plenty and now.zone is not Zone.QUIET))
    if behind or mode is not decision.mode:
        decision = msgspec.structs.replace(decision, mode=mode, write_behind=behind)
    return decision, state if mode is state.mode else msgspec.structs.replace(state, mode=mode)


def pause_s(config: GovernorConfig, reading: Reading, state: LawState | None = None) -> float:
    """Time until the next reading: `poll_s` with plenty of headroom, less the sooner it could be gone; with
    `state`, more where nothing can be given, and between two slices of a restore by the room there is."""
    if state is not None and state.run_bytes:
        return slice_pause_s(config, spare_bytes(config, reading))
    spares = [
        level.headroom_bytes - line_bytes(config, level.limit_bytes)
        for level in reading.levels
        if level.headroom_bytes is not None and level.limit_bytes
    ]
    half_gone_s = soonest_s(min(spares)) if spares else config.poll_s
    pause = min(config.poll_s, max(config.poll_busy_s, half_gone_s))
    return max(pause, _NOTHING_LEFT_S) if state is not None and state.nothing_left else pause


def soonest_s(spare_bytes: int) -> float:
    """When the fastest process could have taken half of them."""
    return max(0, spare_bytes) / FASTEST_BYTES_PER_S / 2


def budget_of(config: GovernorConfig, cache: CacheSnapshot) -> int:
    """Bytes at the cost of fidelity that may be given up in any 60 s."""
    return math.floor(config.budget_per_min * cache.total_bytes)


def _settled(state: LawState, mode: Mode) -> Mode:
    if mode is Mode.WATCHING and state.mode in {Mode.TRIMMING, Mode.HOLDING}:
        return state.mode if state.time_s - state.pressed_s < SETTLE_S else mode
    if mode is Mode.CALM and state.mode is not Mode.RESTORING:
        return state.mode if state.time_s - state.unquiet_s < SETTLE_S else mode
    return mode


class _Given(NamedTuple):
    """What a turn under pressure goes by."""

    now: View
    cache: CacheSnapshot
    order: Order
    cache_limit: float | None


def _under_pressure(config: GovernorConfig, state: LawState, given: _Given) -> tuple[Decision, LawState]:
    now, cache, step = given.now, given.cache, max(1, given.cache.step_bytes)
    wanted = _wanted(config, given)
    allowed, bound, left = _allowed(config, state, now, cache)
    n_bytes = wanted if wanted <= allowed else allowed // step * step
    if n_bytes < step:  # at the floor each token that is decoded would be a trim of its own
        state = msgspec.structs.replace(state, nothing_left=not left)
        return nothing(Mode.HOLDING, f"{now.why}, but {bound}"), state
    if why := _wait(config, state, given, costless=n_bytes <= cache.lossless_bytes):
        return nothing(Mode.TRIMMING, f"{now.why}; {why}"), state
    decision = Decision(
        action=Action.TRIM,
        n_bytes=n_bytes,
        mode=Mode.TRIMMING,
        reason=f"{now.why}: {mib(n_bytes)} of {mib(cache.trimmable_bytes)} that can be given go",
        urgent=now.zone is Zone.ACUTE,
    )
    return decision, trimmed(state, now, cache, n_bytes)


def _wanted(config: GovernorConfig, given: _Given) -> int:
    """Bytes that the pressure asks for, or the cache limit."""
    now, cache = given.now, given.cache
    if now.zone is Zone.ACUTE:
        wanted = acute_step(config, now, cache, given.order.share)
    else:
        wanted = small_step(config, now.excess, cache)
    if given.cache_limit is None:
        return wanted
    above_limit = cache.live_bytes - math.floor(given.cache_limit * cache.total_bytes)
    return max(wanted, whole_steps(above_limit, cache))


def _wait(config: GovernorConfig, state: LawState, given: _Given, *, costless: bool) -> str:
    """Why the next trim is not made yet, or an empty string."""
    now, since_trim_s = given.now, given.now.time_s - state.last_trim_s
    acute = now.zone is Zone.ACUTE
    # Headroom shows at once what a step gave, stall only in its window.
    if acute or (costless and now.missing_bytes and not now.stalled):
        cooldown_s = config.cooldown_acute_s
    elif now.stall <= state.trim_stall / 2 and not now.missing_bytes:
        cooldown_s = 2 * config.cooldown_s  # the last step is taking effect: see how far
    else:
        cooldown_s = config.cooldown_s * (1.0 + state.jitter)
    if since_trim_s < cooldown_s:
        return f"the last trim was {since_trim_s:.2f} s ago, cooldown is {cooldown_s:g} s"
    since_s = now.time_s if state.pressed_since_s is None else state.pressed_since_s
    return given.order.why_not_give(now.time_s - since_s, acute=acute)


def _allowed(
    config: GovernorConfig, state: LawState, now: View, cache: CacheSnapshot
) -> tuple[int, str, bool]:
    """Bytes that may go now, what holds back the rest, and whether a worse reading may find more."""
    spent, budget = sum(n_bytes for _, n_bytes in state.given_up), budget_of(config, cache)
    free = cache.lossless_bytes
    nothing_there = "nothing can be given: the floor and what is protected are all there is"
    held = f"the budget holds: {mib(spent)} of {mib(budget)} went in the last {BUDGET_WINDOW_S:g} s"
    bounds = [(cache.trimmable_bytes, nothing_there, False), (free + max(0, budget - spent), held, False)]
    futile = futile_by_now(state, now, cache)
    kept = futile >= config.futile_trims and now.time_s - state.last_trim_s < config.futile_hold_s
    if kept and now.zone is not Zone.ACUTE:
        why = (
            f"{futile} trims in a row brought no relief: somebody takes what is returned, or nobody needs it"
        )
        bounds.append((free, f"{why}, so the rest is kept", True))
    return min(bounds, key=lambda bound: bound[0])
