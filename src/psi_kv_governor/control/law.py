"""The law: a reading and a snapshot in, a decision out. No I/O and no clock, so a trace replays exactly."""

from __future__ import annotations

import math

import msgspec

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control.decision import Action, CacheSnapshot, Decision, Mode
from psi_kv_governor.control.view import View, Zone, flaw, view
from psi_kv_governor.pressure.reading import Reading

BUDGET_WINDOW_S = 60.0
"""Time over which `budget_per_min` counts what was given up."""


class LawState(msgspec.Struct, frozen=True, kw_only=True):
    """What the law remembers from one reading to the next. Begin with `LawState()`."""

    mode: Mode = Mode.CALM
    time_s: float = -math.inf
    """Time of the last reading that was used."""
    last_trim_s: float = -math.inf
    last_restore_s: float = -math.inf
    quiet_since_s: float | None = None
    """First of the unbroken run of quiet readings; None when the last reading was not quiet."""
    given_up: tuple[tuple[float, int], ...] = ()
    """(time, cells) of each trim asked for in the last 60 s, oldest first."""


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
    now = view(config, reading)
    state = msgspec.structs.replace(
        state,
        time_s=reading.time_s,
        given_up=tuple(past for past in state.given_up if reading.time_s - past[0] <= BUDGET_WINDOW_S),
        quiet_since_s=_quiet_since(state, now),
    )
    if now.zone is Zone.PRESSURE:
        return _under_pressure(config, state, now, cache, cache_limit)
    if now.zone is Zone.BETWEEN:
        return _settle(state, _nothing(Mode.WATCHING, now.why))
    if now.zone is Zone.UNKNOWN:
        return _settle(state, _nothing(state.mode, now.why))
    return _when_quiet(config, state, now, cache)


def floor_of(config: GovernorConfig, cache: CacheSnapshot) -> int:
    """Cells that stay live whatever the pressure says."""
    return max(config.floor_cells, math.ceil(config.floor_share * cache.total_cells))


def budget_of(config: GovernorConfig, cache: CacheSnapshot) -> int:
    """Cells that may be given up in any 60 s."""
    return math.floor(config.budget_per_min * cache.total_cells)


def _quiet_since(state: LawState, now: View) -> float | None:
    if now.zone is not Zone.QUIET:
        return None
    return now.time_s if state.quiet_since_s is None else state.quiet_since_s


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
    if since_trim_s < config.cooldown_s:
        wait = f"the last trim was {since_trim_s:.2f} s ago, cooldown is {config.cooldown_s:g} s"
        return _settle(state, _nothing(Mode.TRIMMING, f"{now.why}; {wait}"))
    decision = Decision(
        action=Action.TRIM,
        cells=cells,
        mode=Mode.TRIMMING,
        reason=f"{now.why}: {cells} of {cache.trimmable_cells} trimmable cells go",
    )
    return decision, msgspec.structs.replace(
        state,
        mode=Mode.TRIMMING,
        last_trim_s=now.time_s,
        given_up=(*state.given_up, (now.time_s, cells)),
    )


def _wanted(config: GovernorConfig, now: View, cache: CacheSnapshot, cache_limit: float | None) -> int:
    """Cells that the pressure asks for: whole blocks, or all that is trimmable."""
    step = _step(config, now.excess, cache)
    if cache_limit is None:
        return step
    above_limit = cache.live_cells - math.floor(cache_limit * cache.total_cells)
    return max(step, _whole_blocks(config, above_limit, cache))


def _step(config: GovernorConfig, excess: float, cache: CacheSnapshot) -> int:
    share = config.step_min + (config.step_max - config.step_min) * excess
    return _whole_blocks(config, max(1, math.ceil(share * cache.trimmable_cells)), cache)


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
    if quiet_s < config.quiet_s:
        mode = state.mode if state.mode is Mode.RESTORING else Mode.HOLDING
        wait = f"quiet for {quiet_s:.1f} of {config.quiet_s:g} s before {cache.spilled_cells} cells come back"
        return _settle(state, _nothing(mode, wait))
    cells, room = _restorable(config, now, cache)
    if cells <= 0:
        return _settle(state, _nothing(Mode.HOLDING, f"quiet, but {room}"))
    decision = Decision(
        action=Action.RESTORE,
        cells=cells,
        mode=Mode.RESTORING,
        reason=f"quiet for {quiet_s:.1f} s and {room}: {cells} of {cache.spilled_cells} spilled cells return",
    )
    return decision, msgspec.structs.replace(state, mode=Mode.RESTORING, last_restore_s=now.time_s)


def _restorable(config: GovernorConfig, now: View, cache: CacheSnapshot) -> tuple[int, str]:
    """Cells that one restore may bring back (whole blocks, or all that is spilled), and why so many."""
    block = config.block_cells
    if now.spare_bytes is None:
        cells = max(block, int(config.step_min * cache.total_cells) // block * block)
        return min(cells, cache.spilled_cells), "headroom is not known, so one small step"
    room_bytes = int(config.restore_share * now.spare_bytes)
    fits = room_bytes // max(1, cache.cell_bytes)
    room = f"{config.restore_share:.0%} of the headroom above the low line holds {fits} cells"
    if fits >= cache.spilled_cells:
        return cache.spilled_cells, room
    # Less than the smallest trim takes is not worth it: so near the line the next trim is likely, and would
    # take more than came back. `simulate --scenario sustained --ctx 32768` without this bound: 19 restores,
    # 11 changes of direction and 19,328 cells given up in 120 s; with it 0, 0 and 14,464.
    least = max(block, _step(config, 0.0, cache))
    if fits < least:
        return 0, f"{room}, fewer than the {least} that the smallest trim takes"
    return fits // block * block, room
