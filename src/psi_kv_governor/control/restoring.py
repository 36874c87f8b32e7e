"""How what was given up comes back: after a quiet time, in slices, into half of what is left."""

from __future__ import annotations

import msgspec

from psi_kv_governor.amounts import mib
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control.decision import Action, CacheSnapshot, Decision, Mode
from psi_kv_governor.control.order import Order
from psi_kv_governor.control.state import LawState, quiet_time_s, restored
from psi_kv_governor.control.steps import nothing, small_step
from psi_kv_governor.control.view import View

SLICE_BYTES = 8 << 20
"""A restore is carried out in such slices, with a reading between: at 1 GB/s one takes 8 ms."""


def slice_pause_s(config: GovernorConfig, spare_bytes: int | None) -> float:
    """Pause between two slices. They come so slowly that half of the spare room is left by what falls in
    `lead_s`: else a restore would be a fall to other governors, which would trim, and restore after it."""
    if not spare_bytes:
        return config.poll_s
    return min(config.poll_s, max(config.poll_busy_s, 2 * SLICE_BYTES * config.lead_s / spare_bytes))


def when_quiet(
    config: GovernorConfig, state: LawState, now: View, cache: CacheSnapshot, order: Order
) -> tuple[Decision, LawState]:
    """What to do at a quiet reading."""
    if cache.masked_bytes <= 0:
        state = msgspec.structs.replace(state, run_bytes=0)
        if cache.lost_bytes > 0:
            lost = f"{mib(cache.lost_bytes)} were lost and are recomputed at the next request"
            return nothing(Mode.HOLDING, f"{now.why}; {lost}"), state
        return nothing(Mode.CALM, now.why), state
    if state.run_bytes:
        return _go_on(config, state, now, cache)
    return _begin(config, state, now, cache, order)


def _begin(
    config: GovernorConfig, state: LawState, now: View, cache: CacheSnapshot, order: Order
) -> tuple[Decision, LawState]:
    # A restore starts the quiet time anew: it takes memory, and its effect has to be seen before the next.
    # Otherwise each reading would fill half of what is left, up to the very line where trimming begins.
    since_s = now.time_s if state.quiet_since_s is None else state.quiet_since_s
    quiet_s = now.time_s - max(state.last_restore_s, since_s)
    needed_s = quiet_time_s(config, state, order.turn_s)
    if quiet_s < needed_s:
        mode = state.mode if state.mode is Mode.RESTORING else Mode.HOLDING
        wait = f"quiet for {quiet_s:.1f} of {needed_s:g} s before {mib(cache.masked_bytes)} come back"
        return nothing(mode, wait), state
    n_bytes, room = _restorable(config, state, now, cache)
    if why := order.why_not_take() or ("" if n_bytes > 0 else room):
        return nothing(Mode.HOLDING, f"quiet, but {why}"), state
    why = f"quiet for {quiet_s:.1f} s and {room}: {mib(n_bytes)} of {mib(cache.masked_bytes)} masked return"
    return _restore(n_bytes, why), restored(state, now, cache, n_bytes, begins=True)


def _go_on(
    config: GovernorConfig, state: LawState, now: View, cache: CacheSnapshot
) -> tuple[Decision, LawState]:
    """The next slice of a restore that runs, as long as each brings something and there is room."""
    came_bytes = state.run_masked_bytes - cache.masked_bytes
    left_bytes = min(state.run_bytes - came_bytes, cache.masked_bytes)
    fits_bytes = (
        left_bytes if now.spare_bytes is None else min(left_bytes, _room_bytes(config, now.spare_bytes))
    )
    least_bytes = min(max(1, cache.step_bytes), cache.masked_bytes)
    if came_bytes > 0 and fits_bytes >= least_bytes:
        why = f"{now.why}: the restore goes on, {mib(left_bytes)} are left of it"
        return _restore(fits_bytes, why), restored(state, now, cache, left_bytes, begins=False)
    ended = msgspec.structs.replace(state, run_bytes=0, last_restore_s=now.time_s)
    if came_bytes <= 0:
        return nothing(Mode.HOLDING, "the restore brought nothing back, and is tried again later"), ended
    return nothing(Mode.RESTORING, f"{now.why}: a part has come back, and its effect is watched"), ended


def _restore(n_bytes: int, why: str) -> Decision:
    return Decision(action=Action.RESTORE, n_bytes=n_bytes, mode=Mode.RESTORING, reason=why)


def _room_bytes(config: GovernorConfig, spare_bytes: int) -> int:
    """What may be filled of the spare room: all but a share or an amount of it, whichever is less."""
    left_bytes = min(int((1.0 - config.restore_share) * spare_bytes), config.restore_reserve_bytes)
    return max(0, spare_bytes - left_bytes) if config.restore_share > 0.0 else 0


def _restorable(config: GovernorConfig, state: LawState, now: View, cache: CacheSnapshot) -> tuple[int, str]:
    """Bytes that one restore may bring back (whole steps, or all that is masked), and why so many."""
    step = max(1, cache.step_bytes)
    if now.spare_bytes is None:
        n_bytes = max(step, int(config.step_min * cache.total_bytes) // step * step)
        return min(n_bytes, cache.masked_bytes), "headroom is not known, so one small step"
    fits = _room_bytes(config, now.spare_bytes)
    room = f"the headroom above the low line has room for {mib(fits)}"
    slowly = max(step, int(state.regrowth * cache.total_bytes) // step * step)
    if min(fits, slowly) >= cache.masked_bytes:
        return cache.masked_bytes, room
    # Less than the smallest trim takes is not worth it: so near the line the next trim is likely, and would
    # take more than came back. `simulate --scenario sustained --ctx 32768` without this bound: 19 restores,
    # 11 changes of direction and 19,328 cells given up in 120 s; with it 0, 0 and 14,464.
    least = max(step, small_step(config, 0.0, cache))
    if fits < least:
        return 0, f"{room}, less than the {mib(least)} that the smallest trim takes"
    return min(fits // step * step, slowly), room
