"""The law: a reading and a snapshot in, a decision out. No I/O and no clock, so a trace replays exactly."""

from __future__ import annotations

import math

import msgspec

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control.decision import Action, CacheSnapshot, Decision, Mode
from psi_kv_governor.control.state import (
    BUDGET_WINDOW_S,
    LawState,
    fall_bytes_per_s,
    futile_by_now,
    high_of,
    quiet_time_s,
    restored,
    seen,
    trimmed,
)
from psi_kv_governor.control.view import View, Zone, flaw, view
from psi_kv_governor.pressure.reading import Reading

_FASTEST_BYTES_PER_S = 2.5e9
"""What a process can take at the most, as measured (250 MiB in 0.1 s): the kernel clears each page first."""


def decide(
    config: GovernorConfig,
    state: LawState,
    reading: Reading,
    cache: CacheSnapshot,
    cache_limit: float | None = None,
) -> tuple[Decision, LawState]:
    """What to do now, and what to remember for the next reading.

    `cache_limit` (0 to 1, checked where it is set) is the share of the context that may stay live while
    the machine is under pressure: live cells are brought to it in one trim, which only the floor, the
    budget and the cooldown hold back. Restores need no such cap: they begin when pressure is over.

    The cells of a TRIM are whole blocks, or all that is trimmable: `policy.select` gives up no more than
    that, so the floor and the budget hold for what is really given up.
    """
    wrong = flaw(reading, state.time_s)
    if wrong:
        # Doubt never restores: the run of quiet readings is broken, everything else stays.
        doubt = msgspec.structs.replace(state, quiet_since_s=None)
        return _nothing(state.mode, f"reading not used: {wrong}"), doubt
    now = view(config, reading, high_of(config, state), fall_bytes_per_s(state, reading))
    state = seen(config, state, reading, now)
    if now.zone in {Zone.ACUTE, Zone.PRESSURE}:
        return _under_pressure(config, state, now, cache, cache_limit)
    if now.zone is Zone.BETWEEN:
        return _settle(state, _nothing(Mode.WATCHING, now.why))
    if now.zone is Zone.UNKNOWN:
        return _settle(state, _nothing(state.mode, now.why))
    return _when_quiet(config, state, now, cache)


def pause_s(config: GovernorConfig, reading: Reading) -> float:
    """Time until the next reading: `poll_s` with plenty of headroom, less the sooner it could be gone."""
    if reading.headroom_bytes is None or reading.limit_bytes is None:
        return config.poll_s
    spare_bytes = reading.headroom_bytes - config.headroom_low * reading.limit_bytes
    at_once_s = max(0.0, spare_bytes) / _FASTEST_BYTES_PER_S / 2
    return min(config.poll_s, max(config.poll_busy_s, at_once_s))


def floor_of(config: GovernorConfig, cache: CacheSnapshot) -> int:
    """Cells that stay live whatever the pressure says."""
    return max(config.floor_cells, math.ceil(config.floor_share * cache.total_cells))


def budget_of(config: GovernorConfig, cache: CacheSnapshot) -> int:
    """Cells that may be given up in any 60 s."""
    return math.floor(config.budget_per_min * cache.total_cells)


def _nothing(mode: Mode, reason: str) -> Decision:
    return Decision(action=Action.NONE, cells=0, mode=mode, reason=reason)


def _settle(state: LawState, decision: Decision) -> tuple[Decision, LawState]:
    return decision, msgspec.structs.replace(state, mode=decision.mode)


# -- giving up ---------------------------------------------------------------------------------------------


def _under_pressure(
    config: GovernorConfig, state: LawState, now: View, cache: CacheSnapshot, cache_limit: float | None
) -> tuple[Decision, LawState]:
    wanted = _wanted(config, now, cache, cache_limit)
    allowed, bound = _allowed(config, state, cache)
    cells = wanted if wanted <= allowed else allowed // config.block_cells * config.block_cells
    if cells <= 0:
        return _settle(state, _nothing(Mode.HOLDING, f"{now.why}, but {bound}"))
    since_trim_s = now.time_s - state.last_trim_s
    if wait := _wait(config, state, now, since_trim_s):
        return _settle(state, _nothing(Mode.TRIMMING, f"{now.why}; {wait}"))
    futile = futile_by_now(state, now, cache)
    if futile >= config.futile_trims and since_trim_s < config.futile_hold_s:
        why = (
            f"{futile} trims in a row brought no relief: somebody takes what is returned, so the rest is kept"
        )
        return _settle(state, _nothing(Mode.HOLDING, f"{now.why}, but {why}"))
    decision = Decision(
        action=Action.TRIM,
        cells=cells,
        mode=Mode.TRIMMING,
        reason=f"{now.why}: {cells} of {cache.trimmable_cells} trimmable cells go",
        urgent=now.zone is Zone.ACUTE,
    )
    return decision, trimmed(config, state, now, cache, cells)


def _wait(config: GovernorConfig, state: LawState, now: View, since_trim_s: float) -> str:
    """Why the next trim is not made yet, or an empty string."""
    if now.zone is Zone.ACUTE:
        cooldown_s = config.cooldown_acute_s
    elif now.stall <= state.trim_stall / 2 and not now.missing_bytes:
        cooldown_s = 2 * config.cooldown_s  # the last step is taking effect: see how far
    else:
        cooldown_s = config.cooldown_s
    if since_trim_s >= cooldown_s:
        return ""
    return f"the last trim was {since_trim_s:.2f} s ago, cooldown is {cooldown_s:g} s"


def _wanted(config: GovernorConfig, now: View, cache: CacheSnapshot, cache_limit: float | None) -> int:
    """Cells that the pressure asks for: whole blocks, or all that is trimmable."""
    step = _acute_step(config, now, cache) if now.zone is Zone.ACUTE else _step(config, now.excess, cache)
    if cache_limit is None:
        return step
    above_limit = cache.live_cells - math.floor(cache_limit * cache.total_cells)
    return max(step, _whole_blocks(config, above_limit, cache))


def _step(config: GovernorConfig, excess: float, cache: CacheSnapshot) -> int:
    share = config.step_min + (config.step_max - config.step_min) * excess
    return _whole_blocks(config, max(1, math.ceil(share * cache.trimmable_cells)), cache)


def _acute_step(config: GovernorConfig, now: View, cache: CacheSnapshot) -> int:
    """One large step: what is missing now and soon at this rate, and at least `step_acute`."""
    least = math.ceil(max(config.step_acute, config.step_max) * cache.trimmable_cells)
    missing = -(-now.missing_bytes // max(1, cache.cell_bytes))
    return _whole_blocks(config, max(1, least, missing), cache)


def _whole_blocks(config: GovernorConfig, cells: int, cache: CacheSnapshot) -> int:
    return min(-(-cells // config.block_cells) * config.block_cells, cache.trimmable_cells)


def _allowed(config: GovernorConfig, state: LawState, cache: CacheSnapshot) -> tuple[int, str]:
    """Cells that may go now, and what holds back the rest."""
    floor = floor_of(config, cache)
    spent, budget = sum(cells for _, cells in state.given_up), budget_of(config, cache)
    bounds = (
        (cache.trimmable_cells, "nothing is trimmable: all live cells are protected"),
        (cache.live_cells - floor, f"the floor of {floor} cells holds: {cache.live_cells} are live"),
        (
            budget - spent,
            f"the budget holds: {spent} of {budget} cells went in the last {BUDGET_WINDOW_S:g} s",
        ),
    )
    return min(bounds, key=lambda bound: bound[0])


# -- taking back -------------------------------------------------------------------------------------------


def _when_quiet(
    config: GovernorConfig, state: LawState, now: View, cache: CacheSnapshot
) -> tuple[Decision, LawState]:
    if cache.spilled_cells <= 0:
        if cache.lost_cells > 0:
            lost = f"{cache.lost_cells} lost cells are recomputed at the next request"
            return _settle(state, _nothing(Mode.HOLDING, f"{now.why}; {lost}"))
        return _settle(state, _nothing(Mode.CALM, now.why))
    # A restore starts the quiet time anew: it takes memory, and its effect has to be seen before the next.
    # Otherwise each reading would fill half of what is left, up to the very line where trimming begins.
    since_s = now.time_s if state.quiet_since_s is None else state.quiet_since_s
    quiet_s = now.time_s - max(state.last_restore_s, since_s)
    needed_s = quiet_time_s(config, state)
    if quiet_s < needed_s:
        mode = state.mode if state.mode is Mode.RESTORING else Mode.HOLDING
        wait = f"quiet for {quiet_s:.1f} of {needed_s:g} s before {cache.spilled_cells} cells come back"
        return _settle(state, _nothing(mode, wait))
    cells, room = _restorable(config, state, now, cache)
    if cells <= 0:
        return _settle(state, _nothing(Mode.HOLDING, f"quiet, but {room}"))
    decision = Decision(
        action=Action.RESTORE,
        cells=cells,
        mode=Mode.RESTORING,
        reason=f"quiet for {quiet_s:.1f} s and {room}: {cells} of {cache.spilled_cells} spilled cells return",
    )
    return decision, restored(state, now)


def _restorable(config: GovernorConfig, state: LawState, now: View, cache: CacheSnapshot) -> tuple[int, str]:
    """Cells that one restore may bring back (whole blocks, or all that is spilled), and why so many."""
    block = config.block_cells
    if now.spare_bytes is None:
        cells = max(block, int(config.step_min * cache.total_cells) // block * block)
        return min(cells, cache.spilled_cells), "headroom is not known, so one small step"
    room_bytes = int(config.restore_share * now.spare_bytes)
    fits = room_bytes // max(1, cache.cell_bytes)
    room = f"{config.restore_share:.0%} of the headroom above the low line holds {fits} cells"
    slowly = max(block, int(state.regrowth * cache.total_cells) // block * block)
    if min(fits, slowly) >= cache.spilled_cells:
        return cache.spilled_cells, room
    # Less than the smallest trim takes is not worth it: so near the line the next trim is likely, and would
    # take more than came back. `simulate --scenario sustained --ctx 32768` without this bound: 19 restores,
    # 11 changes of direction and 19,328 cells given up in 120 s; with it 0, 0 and 14,464.
    least = max(block, _step(config, 0.0, cache))
    if fits < least:
        return 0, f"{room}, fewer than the {least} that the smallest trim takes"
    return min(fits // block * block, slowly), room
