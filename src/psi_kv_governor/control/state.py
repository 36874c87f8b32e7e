"""What the law remembers from one reading to the next, and how a reading changes it."""

from __future__ import annotations

import math

import msgspec

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control.decision import CacheSnapshot, Mode
from psi_kv_governor.control.past import STALL_WINDOW_S, Look, Past
from psi_kv_governor.control.view import PRESSED, Thresholds, View, Zone

BUDGET_WINDOW_S = 60.0
"""Time over which `budget_per_min` counts what was given up."""

_NOISE_UP_S, _NOISE_DOWN_S = 30.0, 300.0
"""Time constants with which the noise of the machine follows its stall upwards, and downwards."""

_NOISE_MARGIN = 3.0
"""Stall is pressure when it is so many times the noise: stall comes in bursts of about that height above
its own mean (a compiler and file copies on a machine with plenty free)."""

_QUIET_MARGIN = 2.0
"""And it is quiet up to so many times the noise: where stall is never under 2 %, that is no shortage."""

MOST_PATIENCE = 128.0
"""Limit of the quiet time's growth: eleven minutes with the default."""

FORGET_S = 600.0
"""After so long without a trim the quiet time is halved again. So, whatever others do, the context goes back
and forth seven times until the quiet time is at its most, and six times an hour from then on."""

SETTLE_S = 1.0
"""Pressure is over, and a milder mode is taken, when its cause has been gone so long: stall flickers from one
tenth of a second to the next, and each change of mode is an event."""

_RELIEF = 0.8
"""A trim brought relief when the stall since is not above this share of the one before it."""

FIRST_REGROWTH = 0.25
"""Share of the context that the first restore after a trim may bring back; each further one twice as much."""

_JITTER = 0.5
"""So much longer the quiet time may be by chance: governors that know nothing of each other do not come back
at the same moment."""


class LawState(msgspec.Struct, frozen=True, kw_only=True):
    """What the law remembers from one reading to the next. Begin with `LawState(jitter=random.random())`."""

    jitter: float = 0.0
    """From 0 to 1, another in each process: see `_JITTER`."""
    mode: Mode = Mode.CALM
    time_s: float = -math.inf
    """Time of the last reading that was used."""
    last_trim_s: float = -math.inf
    last_restore_s: float = -math.inf
    quiet_since_s: float | None = None
    """First of the unbroken run of quiet readings; None when the last reading was not quiet."""
    pressed_since_s: float | None = None
    """When the pressure of the last moments began; None where there was none for SETTLE_S."""
    pressed_s: float = -math.inf
    """Last reading under pressure."""
    unquiet_s: float = -math.inf
    """Last reading that was not quiet."""
    nothing_left: bool = False
    """Under pressure, and nothing can be given."""
    given_up: tuple[tuple[float, int], ...] = ()
    """(time, bytes that cost fidelity) of each trim asked for in the last 60 s, oldest first."""
    looks: tuple[Look, ...] = ()
    """The readings of the last second, oldest first."""
    noise: float = 0.0
    """Stall of this machine while there is plenty of headroom, smoothed."""
    futile: int = 0
    """Trims in a row after which it was no better."""
    trim_stall: float = 0.0
    """Stall of the moments before the last trim ..."""
    trim_by_stall: bool = False
    """... whether that was what it was for ..."""
    trim_headroom_bytes: int = 0
    """... headroom ..."""
    trim_bytes: int = 0
    """... what was asked for then ..."""
    trim_away_bytes: int = 0
    """... and what had been given up before it."""
    stall_since_s: float = 0.0
    """Time lost to stalls since the last trim."""
    run_bytes: int = 0
    """What the restore that runs may still bring back; 0 while none runs."""
    run_masked_bytes: int = 0
    """What was masked when its last slice was asked for."""
    regrowth: float = FIRST_REGROWTH
    """Share of the context that the next restore may bring back."""
    patience: float = 1.0
    """How many times `quiet_s` has to pass before anything comes back: twice as many after each restore
    that was followed by a trim."""
    patience_s: float = -math.inf
    """When it was changed last."""


def thresholds_of(config: GovernorConfig, state: LawState) -> Thresholds:
    """The stall thresholds as they are now: they follow the machine's own noise, up to `high_max`."""
    if not state.noise:
        return Thresholds(config.low, config.high)
    high = max(config.high, min(config.high_max, _NOISE_MARGIN * state.noise))
    return Thresholds(low=max(config.low, min(_QUIET_MARGIN * state.noise, 0.8 * high)), high=high)


def quiet_time_s(config: GovernorConfig, state: LawState, turn_s: float | None = None) -> float:
    """How long it has to be quiet before anything comes back. `turn_s` is what its turn among neighbours
    adds; where none are known, chance does."""
    wait_s = config.quiet_s * state.patience
    return wait_s + (_JITTER * state.jitter * wait_s if turn_s is None else turn_s)


# -- how a reading changes it ------------------------------------------------------------------------------


def seen(state: LawState, past: Past, now: View) -> LawState:
    """The state after a usable reading, before anything is decided."""
    quiet, pressed = now.zone is Zone.QUIET, now.zone in PRESSED
    forgets = state.patience > 1.0 and now.time_s - max(state.patience_s, state.last_trim_s) >= FORGET_S
    return msgspec.structs.replace(
        state,
        time_s=now.time_s,
        given_up=_lately(state.given_up, now.time_s),
        quiet_since_s=(now.time_s if state.quiet_since_s is None else state.quiet_since_s) if quiet else None,
        pressed_since_s=_pressed_since_s(state, past.look, pressed=pressed),
        pressed_s=now.time_s if pressed else state.pressed_s,
        unquiet_s=state.unquiet_s if quiet else now.time_s,
        nothing_left=False,
        looks=_looks(past),
        noise=_noise(state, past, now),
        stall_since_s=state.stall_since_s + now.stall * past.look.covered_s,
        futile=state.futile if pressed or now.time_s - state.pressed_s < SETTLE_S else 0,
        run_bytes=state.run_bytes if quiet else 0,
        patience=max(1.0, state.patience / 2) if forgets else state.patience,
        patience_s=now.time_s if forgets else state.patience_s,
    )


def _lately(given_up: tuple[tuple[float, int], ...], time_s: float) -> tuple[tuple[float, int], ...]:
    first = 0
    while first < len(given_up) and time_s - given_up[first][0] > BUDGET_WINDOW_S:
        first += 1
    return given_up[first:]


def _pressed_since_s(state: LawState, look: Look, *, pressed: bool) -> float | None:
    if state.pressed_since_s is not None and look.time_s - state.pressed_s < SETTLE_S:
        return state.pressed_since_s
    return look.time_s - look.covered_s if pressed else None


def _looks(past: Past) -> tuple[Look, ...]:
    looks, reading, first = past.looks, past.reading, 0
    while first < len(looks) and reading.time_s - looks[first].time_s > STALL_WINDOW_S:
        first += 1
    kept = looks[first:]
    # Whoever gave or took while its size is not told has moved the headroom: no fall is seen across that.
    if reading.own > 0.0 and reading.own_resident_bytes is None:
        kept = tuple(msgspec.structs.replace(look, rooms={}) for look in kept)
    return (*kept, past.look)


def _noise(state: LawState, past: Past, now: View) -> float:
    """Learned only where memory is plenty: elsewhere stall is what the governor is there for."""
    if not now.plenty or past.reading.interval_s <= 0.0:
        return state.noise
    slow_s = _NOISE_UP_S if now.noise > state.noise else _NOISE_DOWN_S
    return state.noise + (now.noise - state.noise) * -math.expm1(-past.look.covered_s / slow_s)


def futile_by_now(state: LawState, now: View, cache: CacheSnapshot) -> int:
    """Trims in a row without relief, the last one judged by now: neither less stall since then than when it
    was asked for, nor half of its bytes in the headroom. Against stall, bytes that nobody takes are no
    relief. A trim that the engine did not make does not count."""
    since_s = now.time_s - state.last_trim_s
    if not state.trim_bytes:
        return 0
    if _away(cache) <= state.trim_away_bytes:
        return state.futile
    less_stall = state.trim_stall > 0.0 and state.stall_since_s <= _RELIEF * state.trim_stall * since_s
    less_stall = less_stall and since_s >= STALL_WINDOW_S  # a tenth of a second without stall tells nothing
    gained = (now.headroom_bytes or 0) - state.trim_headroom_bytes >= state.trim_bytes / 2
    relief = less_stall or (gained and not state.trim_by_stall)
    return 0 if relief else state.futile + 1


def _away(cache: CacheSnapshot) -> int:
    return cache.masked_bytes + cache.lost_bytes


def trimmed(state: LawState, now: View, cache: CacheSnapshot, n_bytes: int) -> LawState:
    """The state after asking for a trim of `n_bytes`."""
    lossy_bytes = max(0, n_bytes - cache.lossless_bytes)
    swung = lossy_bytes > 0 and state.last_restore_s > state.last_trim_s
    return msgspec.structs.replace(
        state,
        mode=Mode.TRIMMING,
        last_trim_s=now.time_s,
        given_up=(*state.given_up, (now.time_s, lossy_bytes)) if lossy_bytes else state.given_up,
        futile=futile_by_now(state, now, cache),
        trim_stall=_mean_stall(state, now),
        trim_by_stall=now.stalled,
        trim_headroom_bytes=now.headroom_bytes or 0,
        trim_bytes=n_bytes,
        trim_away_bytes=_away(cache),
        stall_since_s=0.0,
        run_bytes=0,
        regrowth=FIRST_REGROWTH,
        patience=min(MOST_PATIENCE, 2 * state.patience) if swung else state.patience,
        patience_s=now.time_s if swung else state.patience_s,
    )


def _mean_stall(state: LawState, now: View) -> float:
    """Over the pressure so far, a second at the most: what the stall after a trim is compared with. The
    stall of the moment would be a peak, and anything after a peak is less."""
    since_s = -math.inf if state.pressed_since_s is None else state.pressed_since_s
    since_s = max(since_s, now.time_s - STALL_WINDOW_S)
    looks = [look for look in state.looks if look.time_s > since_s]
    covered_s = sum(look.covered_s for look in looks)
    if covered_s <= 0.0:
        return now.stall
    return min(1.0, sum(look.stalls.get(now.level, 0.0) * look.covered_s for look in looks) / covered_s)


def restored(state: LawState, now: View, cache: CacheSnapshot, run_bytes: int, *, begins: bool) -> LawState:
    """The state after asking for a slice of a restore that may bring back `run_bytes` yet."""
    return msgspec.structs.replace(
        state,
        mode=Mode.RESTORING,
        last_restore_s=now.time_s,
        run_bytes=run_bytes,
        run_masked_bytes=cache.masked_bytes,
        regrowth=min(1.0, 2 * state.regrowth) if begins else state.regrowth,
    )
