"""How the law lets come back what was given up: when, how much, in slices, and how often."""

from __future__ import annotations

import math

import pytest
from law_help import CELL_BYTES, CONFIG, cells, changed, follow, reading, replay, snapshot

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import (
    Action,
    CacheSnapshot,
    Decision,
    LawState,
    Mode,
    budget_of,
    decide,
    pause_s,
)
from psi_kv_governor.pressure.reading import Reading

# -- back again --------------------------------------------------------------------------------------------


def quiet_run(
    headroom: float | None, cache: CacheSnapshot, seconds: int = 6, config=CONFIG
) -> list[Decision]:
    return replay([reading(time_s=100.0 + t, headroom=headroom) for t in range(seconds)], cache, config)


def test_spilled_cells_come_back_after_the_quiet_time():
    decisions = quiet_run(0.5, snapshot(live=3040, spilled=960))
    assert [decision.mode for decision in decisions] == [*[Mode.HOLDING] * 5, Mode.RESTORING]
    assert [cells(decision) for decision in decisions] == [0, 0, 0, 0, 0, 960]


def test_each_restore_brings_back_twice_as_much_as_the_one_before_it():
    decisions = follow([reading(time_s=100.0 + t, headroom=0.5) for t in range(21)], snapshot(400, 7792))
    came = [cells(d) for d in decisions if d.action is Action.RESTORE]
    assert came == [2048, 4096, 1648]  # a quarter of the context, half of it, and all that is away


def test_a_moment_before_the_quiet_time_is_over_nothing_comes_back():
    looks = [reading(time_s=100.0 + t) for t in (0.0, 4.9375, 5.0)]
    actions = [decision.action for decision in replay(looks, snapshot(live=2000, spilled=2000))]
    assert actions == [Action.NONE, Action.NONE, Action.RESTORE]


@pytest.mark.parametrize("some", [0.02, 0.5, math.nan], ids=["between", "pressure", "broken"])
def test_anything_but_quiet_starts_the_quiet_time_anew(some):
    cache = snapshot(live=1000, spilled=3000, trimmable=0)
    looks = [reading(time_s=100.0 + t, some=some if t == 4 else 0.0) for t in range(11)]
    actions = [decision.action for decision in replay(looks, cache)]
    assert actions.index(Action.RESTORE) == 10


def test_low_headroom_is_never_quiet():
    cache = snapshot(live=1000, spilled=3000, trimmable=0)
    assert {decision.action for decision in quiet_run(0.03, cache, 20)} == {Action.NONE}


def test_a_restore_fits_in_its_share_of_the_headroom_above_the_line():
    config = GovernorConfig(headroom_low=0.04, restore_share=0.5)
    cache = snapshot(live=50_000, spilled=50_000)  # 1 KB a cell, 1 GB limit: half of 1 % above is 5,000 cells
    assert quiet_run(0.05, cache, config=config)[-1].n_bytes == 4992 * CELL_BYTES  # 78 whole blocks


def test_headroom_for_less_than_the_smallest_trim_holds():
    cache = snapshot(live=2000, spilled=2000)  # the smallest trim takes 120 -> 128 cells
    decision = quiet_run(0.04025, cache)[-1]
    assert (decision.action, decision.mode) == (Action.NONE, Mode.HOLDING)
    assert "less than the 0.1 MiB that the smallest trim takes" in decision.reason
    assert cells(quiet_run(0.04026, cache)[-1]) == 128
    assert cells(quiet_run(0.04025, snapshot(live=3990, spilled=10))[-1]) == 10  # all that is left


def test_unknown_headroom_restores_a_small_step():
    assert cells(quiet_run(None, snapshot(live=2096, spilled=2000))[-1]) == 384  # a tenth, whole blocks
    assert cells(quiet_run(None, snapshot(live=300, spilled=100))[-1]) == 64  # at least a block
    assert cells(quiet_run(None, snapshot(live=300, spilled=10))[-1]) == 10


def test_without_psi_it_comes_back_by_headroom_alone():
    looks = [changed(reading(time_s=100.0 + t, headroom=0.5), some=None, full=None) for t in range(7)]
    actions = [d.action for d in replay(looks, snapshot(live=3040, spilled=960))]
    assert actions.index(Action.RESTORE) == 5
    short = [changed(one, headroom_bytes=10) for one in looks]
    assert Action.RESTORE not in {d.action for d in replay(short, snapshot(live=3040, spilled=960))}


def test_each_restore_is_watched_for_a_quiet_time():
    looks = [reading(time_s=100.0 + t, headroom=0.05) for t in range(19)]
    decisions = follow(looks, snapshot(live=50_000, spilled=50_000))
    restores = [t for t, decision in enumerate(decisions) if decision.action is Action.RESTORE]
    assert restores == [5, 11, 17]  # the reading after each sees what it brought
    assert {decision.mode for decision in decisions[5:]} == {Mode.RESTORING}


def test_lost_cells_are_left_to_the_next_request():
    decision = quiet_run(0.5, snapshot(live=3000, lost=1000))[-1]
    assert (decision.action, decision.mode) == (Action.NONE, Mode.HOLDING)
    assert "recomputed at the next request" in decision.reason


def test_the_budget_follows_the_length_of_the_context():
    assert budget_of(CONFIG, snapshot(live=1001, lost=1000)) == 4002 * CELL_BYTES


# -- slices ------------------------------------------------------------------------------------------------

SLICE = 8


def sliced(looks: list[Reading], cache: CacheSnapshot, config: GovernorConfig = CONFIG) -> list[Decision]:
    """As the governor does it: a restore brings back a slice of 8 cells, and then there is a reading."""
    state, decisions = LawState(), []
    for look in looks:
        decision, state = decide(config, state, look, cache)
        decisions.append(decision)
        gone = cells(decision) if decision.action is Action.TRIM else -min(SLICE, cells(decision))
        live, spilled = cache.live_bytes // CELL_BYTES - gone, cache.masked_bytes // CELL_BYTES + gone
        cache = snapshot(live=live, spilled=spilled, block=4)
    return decisions


def looks_of(seconds: float, **figures) -> list[Reading]:
    return [reading(time_s=100.0 + i / 10, interval_s=0.1, **figures) for i in range(round(seconds * 10))]


def test_a_restore_goes_on_with_each_quiet_reading():
    decisions = sliced(looks_of(8.0, headroom=0.5), snapshot(live=4016, spilled=80, block=4))
    restores = [i for i, d in enumerate(decisions) if d.action is Action.RESTORE]
    assert restores == list(range(50, 60))  # ten slices, one a reading, after one quiet time
    assert decisions[60].mode is Mode.CALM


@pytest.mark.parametrize("figures", [{"some": 0.05}, {"headroom": 0.03}, {"some": math.nan}], ids=str)
def test_any_reading_that_is_not_quiet_stops_a_restore_at_once(figures):
    looks = looks_of(18.0, headroom=0.2)
    looks[53] = reading(time_s=105.3, interval_s=0.1, **{"headroom": 0.2, **figures})
    decisions = sliced(looks, snapshot(live=3996, spilled=100, block=4))
    restores = [i for i, d in enumerate(decisions) if d.action is Action.RESTORE]
    assert restores[:4] == [50, 51, 52, restores[3]]
    assert restores[3] >= 53 + 50  # a whole quiet time later


def test_a_restore_ends_with_the_room_that_it_was_given():
    """Half of what is above the line, as it was when it began: not half of the rest at each reading."""
    decisions = sliced(looks_of(15.0, headroom=0.041), snapshot(live=3000, spilled=600, block=4))
    came = sum(SLICE for d in decisions if d.action is Action.RESTORE)
    assert came == pytest.approx(500, abs=SLICE)  # of 1,000 cells above the line


def test_a_restore_that_brings_nothing_is_not_tried_at_each_reading():
    cache = snapshot(live=3040, spilled=960)
    decisions = replay(looks_of(20.0, headroom=0.5), cache)
    assert sum(d.action is Action.RESTORE for d in decisions) <= 4
    assert any("brought nothing back" in d.reason for d in decisions)


@pytest.mark.parametrize(("headroom", "pause"), [(0.5, 0.02), (0.1, 0.0699), (0.05, 0.2)])
def test_the_slices_come_the_slower_the_less_room_there_is(headroom, pause):
    """8 MiB each: in a quarter of a second no more than half of what is above the line."""
    state, cache = LawState(), snapshot(live=3040, spilled=960)
    for look in looks_of(5.1, headroom=headroom):
        decision, state = decide(CONFIG, state, look, cache)
    assert decision.action is Action.RESTORE
    assert pause_s(CONFIG, look, state) == pytest.approx(pause, abs=0.001)


# -- swings ------------------------------------------------------------------------------------------------


def test_a_restore_that_was_followed_by_a_trim_makes_the_next_wait_longer():
    looks = [reading(time_s=100.0 + t, some=0.5 if t == 7 else 0.0) for t in range(20)]
    restores = [
        t for t, d in enumerate(follow(looks, snapshot(live=3040, spilled=300))) if d.action is Action.RESTORE
    ]
    assert restores == [5, 18]  # 5 s of quiet, and after the swing 10 s


def test_a_long_quiet_time_forgets_the_swing():
    state, restores = LawState(), []
    cache = snapshot(live=3040, spilled=960)
    for t in range(1500):
        look = reading(time_s=100.0 + t, some=0.5 if t in {7, 1000} else 0.0)
        decision, state = decide(CONFIG, state, look, cache if t < 20 or t >= 1000 else snapshot())
        restores += [t] if decision.action is Action.RESTORE else []
    assert restores[:3] == [5, 18, 1011]  # twice the quiet time for this swing, not four times
