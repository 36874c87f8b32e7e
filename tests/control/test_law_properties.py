"""The law over random traces, against an engine that gives up as much as it may, or less."""

from __future__ import annotations

import itertools
import math

import msgspec
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from law_strategies import LIMIT_BYTES, SHORT, Cache, caches, configs, headrooms, of, play, shares, traces

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import (
    Action,
    LawState,
    Mode,
    budget_of,
    decide,
)
from psi_kv_governor.control.past import FALL_WINDOW_S
from psi_kv_governor.control.state import FORGET_S, MOST_PATIENCE
from psi_kv_governor.pressure.reading import MACHINE, Level, Reading, one_level


@SHORT
@given(configs(), traces(), caches)
def test_a_trim_keeps_budget_and_cooldown(config, looks, cache):
    trims = of(play(config, looks, cache), Action.TRIM)
    for index, (look, before, decision) in enumerate(trims):
        assert 0 < decision.n_bytes <= before.trimmable_bytes
        assert decision.n_bytes % before.step_bytes == 0 or decision.n_bytes == before.trimmable_bytes
        recent = [
            max(0, d.n_bytes - b.lossless_bytes)
            for r, b, d in trims[: index + 1]
            if look.time_s - r.time_s <= 60.0
        ]
        if decision.n_bytes > before.lossless_bytes:
            assert sum(recent) <= budget_of(config, before)
        if index:
            costless = decision.n_bytes <= before.lossless_bytes and look.headroom_bytes is not None
            soon = decision.urgent or costless
            cooldown_s = min(config.cooldown_s, config.cooldown_acute_s) if soon else config.cooldown_s
            assert look.time_s - trims[index - 1][0].time_s >= cooldown_s


@SHORT
@given(configs(), traces(), caches)
def test_no_trim_without_a_cause(config, looks, cache):
    steps = play(config, looks, cache)
    for index, (look, _, decision) in enumerate(steps):
        if decision.action is not Action.TRIM:
            continue
        share = math.inf if look.headroom_bytes is None else look.headroom_bytes / LIMIT_BYTES
        stalled = look.interval_s > 0 and (look.some >= config.high or look.full >= config.acute_full)
        shielded = math.isfinite(share) and share > config.headroom_plenty
        falls = any(
            look.time_s - earlier.time_s <= FALL_WINDOW_S and earlier.headroom_bytes > look.headroom_bytes
            for earlier, _, _ in steps[:index]
            if earlier.headroom_bytes is not None and look.headroom_bytes is not None
        )
        assert (stalled and not shielded) or share < config.headroom_low or falls


@SHORT
@given(configs(), caches, st.floats(0.1, 1.0), shares, st.sampled_from([0.02, 0.1, 0.5, 2.0]))
def test_without_relief_no_more_than_a_few_trims_go_in_a_row(config, cache, some, headroom, gap_s):
    """A machine on which nothing ever gets better, whatever goes."""
    look = one_level(
        time_s=0.0,
        interval_s=gap_s,
        some=some,
        full=some / 2,
        headroom_bytes=int(headroom * LIMIT_BYTES),
        limit_bytes=LIMIT_BYTES,
    )
    looks = [msgspec.structs.replace(look, time_s=i * gap_s) for i in range(150)]
    steps = of(play(config, looks, cache), Action.TRIM)
    trims = [one for one in steps if one[2].n_bytes > one[1].lossless_bytes and not one[2].urgent]
    for before, after in itertools.pairwise(trims[config.futile_trims - 1 :]):
        assert after[0].time_s - before[0].time_s >= config.futile_hold_s


@SHORT
@given(configs(), traces(), caches)
def test_a_restore_needs_a_quiet_time_and_fits_in_the_headroom(config, looks, cache):
    """Its first slice needs a quiet time; each further one that all was quiet since."""
    steps = play(config, looks, cache)
    runs = False
    for index, (look, before, decision) in enumerate(steps):
        if decision.action is not Action.RESTORE:
            runs = False
            continue
        assert 0 < decision.n_bytes <= before.masked_bytes
        begin_s = look.time_s - (0.0 if runs else config.quiet_s)
        earlier = [r for r, _, _ in steps[: index + 1] if begin_s <= r.time_s]
        runs = True
        assert all(0.0 <= r.some < max(config.high_max, config.high) for r in earlier)
        for r in earlier:
            assert r.headroom_bytes is None or r.headroom_bytes >= config.headroom_low * LIMIT_BYTES
        if look.headroom_bytes is not None:
            spare_bytes = look.headroom_bytes - config.headroom_low * LIMIT_BYTES
            assert decision.n_bytes <= config.restore_share * spare_bytes + 1


@SHORT
@given(configs(), traces(), caches)
def test_no_swing_from_trim_to_restore_within_a_quiet_time(config, looks, cache):
    steps = play(config, looks, cache)
    for before, after in itertools.pairwise(s for s in steps if s[2].action is not Action.NONE):
        if before[2].action is Action.TRIM and after[2].action is Action.RESTORE:
            assert after[0].time_s - before[0].time_s >= config.quiet_s


@settings(max_examples=6)  # two hours each
@given(
    st.lists(st.tuples(st.floats(1.0, 2000.0), st.floats(0.0, 3.0)), min_size=1, max_size=30),
    st.floats(0.0, 1.0),
)
def test_whatever_others_do_the_context_goes_back_and_forth_a_few_times_an_hour(bursts, jitter):
    """Bursts of pressure at any moments, the worst of which is right after a restore."""
    config, cache, state = GovernorConfig(), Cache(4096, 1000), LawState(jitter=jitter)
    time_s, restored, swings = 0.0, False, []
    pauses = itertools.cycle(bursts)
    wait_s, burst_s = next(pauses)
    while time_s < 7200.0 and len(swings) < 1000:
        time_s += 0.5
        wait_s -= 0.5
        short = wait_s <= 0.0
        if wait_s <= -burst_s - 0.5:
            wait_s, burst_s = next(pauses)
            wait_s = min(wait_s, 8.0) if cache.masked == 0 else wait_s
        look = one_level(
            time_s=time_s,
            interval_s=0.5,
            headroom_bytes=int((0.03 if short else 0.2) * LIMIT_BYTES),
            limit_bytes=LIMIT_BYTES,
        )
        decision, state = decide(config, state, look, cache.snapshot())
        if decision.action is Action.TRIM and restored:
            swings.append(time_s)
            restored = False
        restored = restored or decision.action is Action.RESTORE
        cache.apply(decision)
        cache.live -= 1
    most = math.log2(MOST_PATIENCE) + 3600.0 / FORGET_S + 1
    assert all(sum(begin <= s < begin + 3600.0 for s in swings) <= most for begin in swings)


@SHORT
@given(configs(), traces(), st.integers(0, 8000))
def test_the_same_inputs_replay_to_the_same_decisions(config, looks, live):
    first, second = (play(config, looks, Cache(live=live, cell_bytes=1000)) for _ in range(2))
    assert [decision for _, _, decision in first] == [decision for _, _, decision in second]


@SHORT
@given(
    configs(),
    traces(),
    caches,
    st.lists(st.tuples(shares, headrooms), min_size=2, max_size=2),
    st.none() | shares,
)
def test_more_pressure_never_asks_for_fewer_bytes(config, looks, cache, pair, cache_limit):
    one, other = pair
    state = LawState()
    for look in looks:
        decision, state = decide(config, state, look, cache.snapshot())
        cache.apply(decision)
    if one[1] is None or other[1] is None:  # unknown cannot be compared with known
        one, other = (one[0], None), (other[0], None)
    gentle = (min(one[0], other[0]), None if one[1] is None else max(one[1], other[1]))
    harsh = (max(one[0], other[0]), None if one[1] is None else min(one[1], other[1]))

    def asked(some: float, headroom: int | None) -> int:
        look = one_level(
            time_s=looks[-1].time_s + 0.5,
            interval_s=0.5,
            some=some,
            full=some / 2,
            headroom_bytes=headroom,
            limit_bytes=LIMIT_BYTES,
        )
        decision, _ = decide(config, state, look, cache.snapshot(), cache_limit)
        return decision.n_bytes if decision.action is Action.TRIM else -decision.n_bytes

    # Less pressure after a trim is relief, which may end a hold: only there can the milder ask for more.
    assume(state.futile + 1 < config.futile_trims)
    assert asked(*harsh) >= asked(*gentle)


@SHORT
@given(configs(), traces(), caches)
def test_every_mode_has_a_reason_and_fits_its_action(config, looks, cache):
    fits = {Action.TRIM: {Mode.TRIMMING}, Action.RESTORE: {Mode.RESTORING}, Action.NONE: set(Mode)}
    for _, _, decision in play(config, looks, cache):
        assert decision.reason
        assert decision.mode in fits[decision.action]
        assert (decision.n_bytes > 0) == (decision.action is not Action.NONE)


def a_level(draw, name: str) -> Level:
    return Level(
        name=name,
        some=draw(st.none() | shares),
        full=draw(st.none() | shares),
        headroom_bytes=draw(headrooms),
        limit_bytes=draw(st.sampled_from([None, LIMIT_BYTES, 128 * LIMIT_BYTES])),
        bites=draw(st.sampled_from([None, True, False])),
        mapped_bytes=draw(st.sampled_from([0, LIMIT_BYTES // 4])),
        grain_bytes=draw(st.sampled_from([0, 1 << 20])),
    )


@SHORT
@given(st.data(), caches)
def test_one_more_level_never_makes_it_less_careful(data, cache):
    """The worst level decides: with another one beside it, no less is given and no more comes back."""
    levels = [a_level(data.draw, MACHINE), a_level(data.draw, "/slice")]
    levels = [msgspec.structs.replace(one, some=one.some or 0.0, bites=None) for one in levels]
    limited = [
        msgspec.structs.replace(one, limit_bytes=LIMIT_BYTES, headroom_bytes=one.headroom_bytes or 0)
        for one in levels
    ]
    one, both = (Reading(time_s=10.0, interval_s=1.0, levels=tuple(some)) for some in (limited[:1], limited))
    snapshot = cache.snapshot()
    config = GovernorConfig(quiet_s=0.0)
    alone, beside = (decide(config, LawState(), look, snapshot)[0] for look in (one, both))
    signed = [d.n_bytes if d.action is Action.TRIM else -d.n_bytes for d in (alone, beside)]
    assert signed[1] >= signed[0]
    assert beside.write_behind >= alone.write_behind
