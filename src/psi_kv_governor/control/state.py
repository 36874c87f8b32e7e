"""What the law remembers from one reading to the next, and how a reading changes it."""

from __future__ import annotations

import math

import msgspec

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control.decision import CacheSnapshot, Mode
from psi_kv_governor.control.view import View, Zone
from psi_kv_governor.pressure.reading import Reading

BUDGET_WINDOW_S = 60.0
"""Time over which `budget_per_min` counts what was given up."""

FALL_WINDOW_S = 0.25
"""How long back the fall of the headroom is looked at: long enough to tell a process that takes memory from
the pages that one page-in brings, short enough that 250 MiB taken in 0.1 s are seen while they are taken."""

_LEAST_FALL_S = 0.015
"""Two looks closer together than this say nothing of a rate: the kernel charges in batches of pages."""

_NOISE_UP_S, _NOISE_DOWN_S = 30.0, 300.0
"""Time constants with which the noise of the machine follows its stall upwards, and downwards."""

_NOISE_MARGIN = 3.0
"""Stall is pressure when it is so many times the noise: stall comes in bursts of about that height above
its own mean (a compiler and file copies on a machine with plenty free)."""

_MOST_PATIENCE = 8.0
"""Limit of the quiet time's growth: 40 s with the default."""

_RELIEF = 0.8
"""A trim brought relief when the next stall is not above this share of the one before it."""

FIRST_REGROWTH = 0.25
"""Share of the context that the first restore after a trim may bring back; each further one twice as much."""


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
    rooms: tuple[tuple[float, int], ...] = ()
    """(time, bytes) of the readings of the last quarter of a second, oldest first: what all but this process
    leave of the limit."""
    noise: float = 0.0
    """Stall of this machine while there is plenty of headroom, smoothed."""
    futile: int = 0
    """Trims in a row after which it was no better."""
    trim_stall: float = 0.0
    """Stall at the last trim ..."""
    trim_headroom_bytes: int = 0
    """... headroom ..."""
    trim_bytes: int = 0
    """... what was asked for then ..."""
    trim_away_cells: int = 0
    """... and what had been given up before it."""
    stall_since_s: float = 0.0
    """Time lost to stalls since the last trim."""
    regrowth: float = FIRST_REGROWTH
    """Share of the context that the next restore may bring back."""
    patience: float = 1.0
    """How many times `quiet_s` has to pass before anything comes back: grows with each restore that was
    followed by a trim."""


def high_of(config: GovernorConfig, state: LawState) -> float:
    """The high threshold as it is now: it follows the machine's own noise, up to `high_max`."""
    return max(config.high, min(config.high_max, _NOISE_MARGIN * state.noise))


def quiet_time_s(config: GovernorConfig, state: LawState) -> float:
    """How long it has to be quiet before anything comes back."""
    return config.quiet_s * state.patience


def fall_bytes_per_s(state: LawState, reading: Reading) -> float:
    """How fast others took headroom until this reading: the steepest over the last quarter of a second.

    What this process itself took or gave (a context that fills, a restore, a trim) is no fall and no rise.
    And it has to fall twice in a row: a burst of file pages moves it once, and back.
    """
    if reading.headroom_bytes is None or reading.own > 0.0:
        return 0.0
    room = _room_bytes(reading)
    before = [n_bytes for _, n_bytes in state.rooms[-2:]]
    if len(before) < 2 or not room < before[1] < before[0]:
        return 0.0
    falls = (
        (n_bytes - room) / (reading.time_s - time_s)
        for time_s, n_bytes in state.rooms
        if _LEAST_FALL_S <= reading.time_s - time_s <= FALL_WINDOW_S
    )
    return max(0.0, max(falls, default=0.0))


def seen(config: GovernorConfig, state: LawState, reading: Reading, now: View) -> LawState:
    """The state after a usable reading, before anything is decided."""
    quiet = now.zone is Zone.QUIET
    long_quiet = quiet and state.quiet_since_s is not None
    begin_s = state.quiet_since_s if state.quiet_since_s is not None else now.time_s
    calm_again = long_quiet and now.time_s - begin_s >= 2 * _MOST_PATIENCE * config.quiet_s
    pressed = now.zone in {Zone.ACUTE, Zone.PRESSURE}
    return msgspec.structs.replace(
        state,
        time_s=reading.time_s,
        given_up=tuple(past for past in state.given_up if reading.time_s - past[0] <= BUDGET_WINDOW_S),
        quiet_since_s=begin_s if quiet else None,
        rooms=_rooms(state, reading),
        noise=_noise(state, reading, now),
        stall_since_s=state.stall_since_s + now.stall * _passed_s(state, reading),
        futile=state.futile if pressed else 0,
        patience=1.0 if calm_again else state.patience,
    )


def _room_bytes(reading: Reading) -> int:
    """What all but this process leave of the limit."""
    return (reading.headroom_bytes or 0) + (reading.own_resident_bytes or 0)


def _rooms(state: LawState, reading: Reading) -> tuple[tuple[float, int], ...]:
    if reading.headroom_bytes is None:
        return ()
    kept = () if reading.own > 0.0 else state.rooms
    recent = tuple(past for past in kept if reading.time_s - past[0] <= FALL_WINDOW_S)
    return (*recent, (reading.time_s, _room_bytes(reading)))


def _noise(state: LawState, reading: Reading, now: View) -> float:
    """Learned only where memory is plenty: elsewhere stall is what the governor is there for."""
    if not now.plenty or reading.interval_s <= 0.0:
        return state.noise
    passed_s = _passed_s(state, reading)
    slow_s = _NOISE_UP_S if now.stall > state.noise else _NOISE_DOWN_S
    return state.noise + (now.stall - state.noise) * -math.expm1(-passed_s / slow_s)


def _passed_s(state: LawState, reading: Reading) -> float:
    """Time since the reading before, as far as this one covers it."""
    return min(reading.interval_s, max(0.0, reading.time_s - state.time_s))


def futile_by_now(state: LawState, now: View, cache: CacheSnapshot) -> int:
    """Trims in a row without relief, the last one judged by now: neither less stall since then than when it
    was asked for, nor half of its bytes in the headroom. One that the engine did not make does not count."""
    since_s = now.time_s - state.last_trim_s
    if not state.trim_bytes:
        return 0
    if _away(cache) <= state.trim_away_cells:
        return state.futile
    less_stall = state.stall_since_s <= _RELIEF * state.trim_stall * since_s and state.trim_stall > 0.0
    gained = (now.headroom_bytes or 0) - state.trim_headroom_bytes >= state.trim_bytes / 2
    return 0 if less_stall or gained else state.futile + 1


def _away(cache: CacheSnapshot) -> int:
    return cache.spilled_cells + cache.lost_cells


def trimmed(config: GovernorConfig, state: LawState, now: View, cache: CacheSnapshot, cells: int) -> LawState:
    """The state after asking for a trim of `cells`."""
    swung = now.time_s - state.last_restore_s <= 2 * quiet_time_s(config, state)
    return msgspec.structs.replace(
        state,
        mode=Mode.TRIMMING,
        last_trim_s=now.time_s,
        given_up=(*state.given_up, (now.time_s, cells)),
        futile=futile_by_now(state, now, cache),
        trim_stall=now.stall,
        trim_headroom_bytes=now.headroom_bytes or 0,
        trim_bytes=cells * cache.cell_bytes,
        trim_away_cells=_away(cache),
        stall_since_s=0.0,
        regrowth=FIRST_REGROWTH,
        patience=min(_MOST_PATIENCE, 2 * state.patience) if swung else state.patience,
    )


def restored(state: LawState, now: View) -> LawState:
    """The state after asking for a restore, whose taking is no fall, also where nothing tells who takes."""
    return msgspec.structs.replace(
        state,
        mode=Mode.RESTORING,
        last_restore_s=now.time_s,
        rooms=(),
        regrowth=min(1.0, 2 * state.regrowth),
    )
