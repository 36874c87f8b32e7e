"""What the law remembers from one reading to the next, and how a reading changes it."""

from __future__ import annotations

import math

import msgspec

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control.decision import CacheSnapshot, Mode
from psi_kv_governor.control.view import PRESSED, STALL_WINDOW_S, Seen, Thresholds, View, Zone
from psi_kv_governor.pressure.reading import Level, Reading

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


class Look(msgspec.Struct, frozen=True, array_like=True):
    """One reading as far as later ones are compared with it."""

    time_s: float
    covered_s: float
    """Time that its stall is of."""
    rooms: dict[str, int] = {}
    """By level: what all but the governed processes leave of the limit, in bytes."""
    stalls: dict[str, float] = {}


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
    high = max(config.high, min(config.high_max, _NOISE_MARGIN * state.noise))
    return Thresholds(low=max(config.low, min(_QUIET_MARGIN * state.noise, 0.8 * high)), high=high)


def quiet_time_s(config: GovernorConfig, state: LawState, turn_s: float | None = None) -> float:
    """How long it has to be quiet before anything comes back. `turn_s` is what its turn among neighbours
    adds; where none are known, chance does."""
    wait_s = config.quiet_s * state.patience
    return wait_s + (_JITTER * state.jitter * wait_s if turn_s is None else turn_s)


# -- what the readings before tell -------------------------------------------------------------------------


def seen_before(state: LawState, reading: Reading) -> dict[str, Seen]:
    """Of each level: how fast others take its headroom, and the time lost to stall in the last second."""
    return {
        level.name: Seen(_fall_bytes_per_s(state, reading, level), _lost_s(state, reading, level))
        for level in reading.levels
    }


def _lost_s(state: LawState, reading: Reading, level: Level) -> float:
    lost_s = _stalls(reading).get(level.name, 0.0) * _passed_s(state, reading)
    for look in state.looks:
        if reading.time_s - look.time_s < STALL_WINDOW_S:
            lost_s += look.stalls.get(level.name, 0.0) * look.covered_s
    return lost_s


def _stalls(reading: Reading) -> dict[str, float]:
    """By level, the share of the time lost that is not a governor's own doing."""
    if reading.interval_s <= 0.0:
        return {}
    return {level.name: max(0.0, level.some - reading.own) for level in reading.levels if level.some}


def _fall_bytes_per_s(state: LawState, reading: Reading, level: Level) -> float:
    """The steepest over the last quarter of a second.

    What the governed processes took or gave themselves (a context that fills, a restore, a trim) is no fall
    and no rise; where that is not told, nothing is while a governor is at work. And it has to fall twice in
    a row, by more than the count may be off: a burst of file pages moves it once, and back.
    """
    if level.headroom_bytes is None or (reading.own > 0.0 and reading.own_resident_bytes is None):
        return 0.0
    room = _room_bytes(reading, level)
    past = [
        (look.time_s, look.rooms[level.name])
        for look in state.looks
        if level.name in look.rooms and reading.time_s - look.time_s <= FALL_WINDOW_S
    ]
    if len(past) < 2 or not room < past[-1][1] < past[-2][1]:
        return 0.0
    falls = (
        (n_bytes - room) / (reading.time_s - time_s)
        for time_s, n_bytes in past
        if reading.time_s - time_s >= _LEAST_FALL_S and n_bytes - room > level.grain_bytes
    )
    return max(0.0, max(falls, default=0.0))


def _room_bytes(reading: Reading, level: Level) -> int:
    """What all but the governed processes leave of the limit. File pages that somebody maps stay room."""
    neighbours = sum(one.resident_bytes for one in reading.neighbours if level.name in one.levels)
    return (level.headroom_bytes or 0) + level.mapped_bytes + (reading.own_resident_bytes or 0) + neighbours


# -- how a reading changes it ------------------------------------------------------------------------------


def seen(config: GovernorConfig, state: LawState, reading: Reading, now: View) -> LawState:
    """The state after a usable reading, before anything is decided."""
    quiet, pressed = now.zone is Zone.QUIET, now.zone in PRESSED
    forgets = state.patience > 1.0 and now.time_s - max(state.patience_s, state.last_trim_s) >= FORGET_S
    return msgspec.structs.replace(
        state,
        time_s=reading.time_s,
        given_up=tuple(past for past in state.given_up if reading.time_s - past[0] <= BUDGET_WINDOW_S),
        quiet_since_s=(now.time_s if state.quiet_since_s is None else state.quiet_since_s) if quiet else None,
        pressed_since_s=_pressed_since_s(state, reading, pressed=pressed),
        pressed_s=now.time_s if pressed else state.pressed_s,
        unquiet_s=state.unquiet_s if quiet else now.time_s,
        nothing_left=False,
        looks=_looks(state, reading),
        noise=_noise(state, reading, now),
        stall_since_s=state.stall_since_s + now.stall * _passed_s(state, reading),
        futile=state.futile if pressed or now.time_s - state.pressed_s < SETTLE_S else 0,
        run_bytes=state.run_bytes if quiet else 0,
        patience=max(1.0, state.patience / 2) if forgets else state.patience,
        patience_s=now.time_s if forgets else state.patience_s,
    )


def _pressed_since_s(state: LawState, reading: Reading, *, pressed: bool) -> float | None:
    if state.pressed_since_s is not None and reading.time_s - state.pressed_s < SETTLE_S:
        return state.pressed_since_s
    return reading.time_s - _passed_s(state, reading) if pressed else None


def _looks(state: LawState, reading: Reading) -> tuple[Look, ...]:
    # Whoever gave or took while its size is not told has moved the headroom: no fall is seen across that.
    blind = reading.own > 0.0 and reading.own_resident_bytes is None
    kept = [look for look in state.looks if reading.time_s - look.time_s <= STALL_WINDOW_S]
    if blind:
        kept = [msgspec.structs.replace(look, rooms={}) for look in kept]
    look = Look(
        reading.time_s,
        _passed_s(state, reading),
        {
            level.name: _room_bytes(reading, level)
            for level in reading.levels
            if level.headroom_bytes is not None
        },
        _stalls(reading),
    )
    return (*kept, look)


def _noise(state: LawState, reading: Reading, now: View) -> float:
    """Learned only where memory is plenty: elsewhere stall is what the governor is there for."""
    if not now.plenty or reading.interval_s <= 0.0:
        return state.noise
    passed_s = _passed_s(state, reading)
    slow_s = _NOISE_UP_S if now.noise > state.noise else _NOISE_DOWN_S
    return state.noise + (now.noise - state.noise) * -math.expm1(-passed_s / slow_s)


def _passed_s(state: LawState, reading: Reading) -> float:
    """Time since the reading before, as far as this one covers it."""
    return min(reading.interval_s, max(0.0, reading.time_s - state.time_s))


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
    since_s = now.time_s if state.pressed_since_s is None else state.pressed_since_s
    span_s = min(STALL_WINDOW_S, now.time_s - since_s)
    return min(1.0, now.lost_s / span_s) if span_s > 0.0 else now.stall


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
