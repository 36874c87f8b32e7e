"""The law: a reading and a snapshot in, a decision out. No I/O and no clock, so a trace replays exactly."""

from __future__ import annotations

import math

import msgspec

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control.decision import Action, CacheSnapshot, Decision, Mode
from psi_kv_governor.control.levels import limited
from psi_kv_governor.control.order import Order, order_of
from psi_kv_governor.control.restoring import when_quiet
from psi_kv_governor.control.room import line_bytes
from psi_kv_governor.control.state import (
    BUDGET_WINDOW_S,
    LawState,
    futile_by_now,
    seen,
    seen_before,
    thresholds_of,
    trimmed,
)
from psi_kv_governor.control.steps import acute_step, nothing, small_step, whole_steps
from psi_kv_governor.control.view import View, Zone, flaw, view
from psi_kv_governor.pressure.reading import Reading

_FASTEST_BYTES_PER_S = 2.5e9
"""What a process can take at the most, as measured (250 MiB in 0.1 s): the kernel clears each page first."""

_NOTHING_LEFT_S = 1.0
"""Pause while nothing can be given: a turn in cold caches takes 0.5 ms, so twenty a second would cost a
hundredth of a core for nothing, and one a second costs 0.05 %."""

_SETTLE_S = 1.0
"""A milder mode is taken when its cause has been gone so long: stall flickers from one tenth of a second to
the next, and each change of mode is an event."""


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
    now = view(config, reading, thresholds_of(config, state), seen_before(state, reading))
    state = seen(config, state, reading, now)
    order = order_of(reading, now, cache)
    if now.zone in {Zone.ACUTE, Zone.PRESSURE}:
        decision, state = _under_pressure(config, state, now, cache, order, cache_limit)
    elif now.zone is Zone.BETWEEN:
        decision = nothing(Mode.WATCHING, now.why)
    elif now.zone is Zone.UNKNOWN:
        decision = nothing(state.mode, now.why)
    else:
        decision, state = when_quiet(config, state, now, cache, order)
    mode = _settled(state, decision.mode)
    behind = not now.plenty and (now.spare_bytes is not None or now.zone is not Zone.QUIET)
    decision = msgspec.structs.replace(
        decision, mode=mode, write_behind=behind and now.zone is not Zone.UNKNOWN
    )
    return decision, msgspec.structs.replace(state, mode=mode)


def pause_s(config: GovernorConfig, reading: Reading, state: LawState | None = None) -> float:
    """Time until the next reading: `poll_s` with plenty of headroom, less the sooner it could be gone; with
    `state`, more where nothing can be given, and none to speak of between two slices of a restore."""
    if state is not None and state.run_bytes:
        return 0.0
    pauses = [
        max(0.0, level.headroom_bytes - line_bytes(config, level.limit_bytes)) / _FASTEST_BYTES_PER_S / 2
        for level in reading.levels
        if level.headroom_bytes is not None and level.limit_bytes
    ]
    pause = min(config.poll_s, max(config.poll_busy_s, min(pauses, default=config.poll_s)))
    return max(pause, _NOTHING_LEFT_S) if state is not None and state.nothing_left else pause


def budget_of(config: GovernorConfig, cache: CacheSnapshot) -> int:
    """Bytes at the cost of fidelity that may be given up in any 60 s."""
    return math.floor(config.budget_per_min * cache.total_bytes)


def _settled(state: LawState, mode: Mode) -> Mode:
    if mode is Mode.WATCHING and state.mode in {Mode.TRIMMING, Mode.HOLDING}:
        return state.mode if state.time_s - state.pressed_s < _SETTLE_S else mode
    if mode is Mode.CALM and state.mode is not Mode.RESTORING:
        return state.mode if state.time_s - state.unquiet_s < _SETTLE_S else mode
    return mode


def _under_pressure(
    config: GovernorConfig,
    state: LawState,
    now: View,
    cache: CacheSnapshot,
    order: Order,
    cache_limit: float | None,
) -> tuple[Decision, LawState]:
    acute = now.zone is Zone.ACUTE
    since_trim_s = now.time_s - state.last_trim_s
    futile = 0 if acute else futile_by_now(state, now, cache)
    kept = futile >= config.futile_trims and since_trim_s < config.futile_hold_s
    allowed, bound, wait = _allowed(config, state, cache, futile if kept else 0)
    step = acute_step(config, now, cache, order.share) if acute else small_step(config, now.excess, cache)
    if cache_limit is not None:
        above_limit = cache.live_bytes - math.floor(cache_limit * cache.total_bytes)
        step = max(step, whole_steps(above_limit, cache))
    n_bytes = step if step <= allowed else allowed // max(1, cache.step_bytes) * max(1, cache.step_bytes)
    if n_bytes <= 0:
        state = msgspec.structs.replace(state, nothing_left=not wait)
        return nothing(Mode.HOLDING, f"{now.why}, but {bound}"), state
    if why := _wait(config, state, now, since_trim_s, order):
        return nothing(Mode.TRIMMING, f"{now.why}; {why}"), state
    decision = Decision(
        action=Action.TRIM,
        n_bytes=n_bytes,
        mode=Mode.TRIMMING,
        reason=f"{now.why}: {_mib(n_bytes)} of {_mib(cache.trimmable_bytes)} that can be given go",
        urgent=acute,
    )
    return decision, trimmed(state, now, cache, n_bytes)


def _wait(config: GovernorConfig, state: LawState, now: View, since_trim_s: float, order: Order) -> str:
    """Why the next trim is not made yet, or an empty string."""
    if now.zone is Zone.ACUTE:
        cooldown_s = config.cooldown_acute_s
    elif now.stall <= state.trim_stall / 2 and not now.missing_bytes:
        cooldown_s = 2 * config.cooldown_s  # the last step is taking effect: see how far
    else:
        cooldown_s = config.cooldown_s
    if since_trim_s < cooldown_s:
        return f"the last trim was {since_trim_s:.2f} s ago, cooldown is {cooldown_s:g} s"
    return order.why_not_give(
        now.time_s - (state.pressed_since_s or now.time_s), acute=now.zone is Zone.ACUTE
    )


def _allowed(
    config: GovernorConfig, state: LawState, cache: CacheSnapshot, futile: int
) -> tuple[int, str, bool]:
    """Bytes that may go now, what holds back the rest, and whether waiting will change that."""
    spent, budget = sum(n_bytes for _, n_bytes in state.given_up), budget_of(config, cache)
    free = cache.lossless_bytes
    bounds = [
        (
            cache.trimmable_bytes,
            "nothing can be given: the floor and what is protected are all there is",
            False,
        ),
        (
            free + max(0, budget - spent),
            f"the budget holds: {_mib(spent)} of {_mib(budget)} went in the last {BUDGET_WINDOW_S:g} s",
            True,
        ),
    ]
    if futile:
        why = (
            f"{futile} trims in a row brought no relief: somebody takes what is returned, or nobody needs it"
        )
        bounds.append((free, f"{why}, so the rest is kept", True))
    return min(bounds, key=lambda bound: bound[0])


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f} MiB"
