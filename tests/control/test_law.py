"""The law on single readings: when it gives up, how much, and for which reason."""

from __future__ import annotations

import math

import pytest
from law_help import CONFIG, LIMIT_BYTES, cells, changed, first, pressed, reading, replay, snapshot

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import (
    Action,
    LawState,
    Mode,
    decide,
    pause_s,
)

# -- when --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("some", "headroom", "action", "mode"),
    [
        (0.00, None, Action.NONE, Mode.CALM),
        (0.019, 0.15, Action.NONE, Mode.CALM),
        (0.02, 0.15, Action.NONE, Mode.WATCHING),
        (0.099, None, Action.NONE, Mode.WATCHING),
        (0.10, None, Action.TRIM, Mode.TRIMMING),
        (0.10, 0.30, Action.TRIM, Mode.TRIMMING),  # plenty begins above its line, not on it
        (0.90, 0.31, Action.NONE, Mode.WATCHING),
        (0.00, 0.04, Action.NONE, Mode.CALM),  # so does shortage: below its line
        (0.00, 0.039, Action.TRIM, Mode.TRIMMING),
        (0.05, 0.0, Action.TRIM, Mode.TRIMMING),
    ],
)
def test_the_thresholds_divide_the_readings(some, headroom, action, mode):
    decision = first(reading(some=some, headroom=headroom), snapshot())
    assert (decision.action, decision.mode) == (action, mode)


def test_stall_without_shortage_says_why_it_is_left_alone():
    assert "stall without shortage" in first(reading(some=0.5, headroom=0.6), snapshot()).reason


def test_the_first_reading_of_a_source_never_acts_on_stall():
    decision = first(reading(some=1.0, interval_s=0.0), snapshot())
    assert (decision.action, decision.mode) == (Action.NONE, Mode.CALM)
    assert "first reading" in decision.reason


def test_the_first_reading_of_a_source_acts_on_headroom():
    assert first(reading(interval_s=0.0, headroom=0.01), snapshot()).action is Action.TRIM


def test_headroom_without_its_limit_is_not_known():
    look = changed(reading(some=0.5, headroom=0.9), limit_bytes=None)
    assert first(look, snapshot()).action is Action.TRIM


@pytest.mark.parametrize(
    "change",
    [
        {"time_s": math.nan},
        {"time_s": math.inf},
        {"time_s": 99.0},
        {"interval_s": math.nan},
        {"interval_s": -1.0},
        {"interval_s": math.inf},
        {"some": math.nan},
        {"some": 1.01},
        {"some": -0.01},
        {"full": math.nan},
        {"full": 2.0},
        {"headroom_bytes": -1},
        {"limit_bytes": 0},
    ],
    ids=str,
)
def test_a_reading_that_makes_no_sense_changes_nothing_and_says_so(change):
    before = decide(CONFIG, LawState(), reading(some=0.5, headroom=0.1), snapshot())[1]
    assert before.mode is Mode.TRIMMING
    broken = changed(reading(time_s=101.0, some=1.0, headroom=0.0), **change)
    decision, after = decide(CONFIG, before, broken, snapshot())
    assert (decision.action, decision.mode) == (Action.NONE, Mode.TRIMMING)
    assert decision.reason.startswith("reading not used: ")
    assert after == before


# -- how much ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("some", "headroom", "share"),
    [
        (0.10, None, 0.10),  # just passed
        (0.55, None, 0.15),  # half way from high to 1
        (1.00, None, 0.20),
        (0.00, 0.02, 0.15),  # half way from the low line to nothing
        (0.55, 0.03, 0.15),  # the larger of both
        (0.10, 0.03, 0.125),
    ],
)
def test_the_step_grows_with_the_excess(some, headroom, share):
    cache = snapshot(live=101_000, trimmable=100_000, block=1)
    gone = cells(first(reading(some=some, headroom=headroom), cache))
    assert gone == pytest.approx(share * 100_000, abs=1)


def test_a_step_is_rounded_up_to_whole_blocks():
    assert cells(first(reading(some=0.1), snapshot(live=1320, trimmable=1000))) == 128  # 100 cells wanted


def test_the_least_step_is_a_block():
    assert cells(first(reading(some=0.1), snapshot(live=1320, trimmable=70))) == 64


def test_less_than_a_block_stays():
    """Else each token that is decoded at the floor would be a trim of its own."""
    decision = first(reading(some=0.1), snapshot(live=1320, trimmable=40))
    assert (decision.action, decision.mode) == (Action.NONE, Mode.HOLDING)


@pytest.mark.parametrize(
    ("cache", "config", "said"),
    [
        (snapshot(live=320), CONFIG, "nothing can be given"),
        (snapshot(live=0), CONFIG, "nothing can be given"),
        (snapshot(), GovernorConfig(budget_per_min=0.0), "the budget holds"),
    ],
    ids=["protected", "empty", "budget"],
)
def test_pressure_without_a_way_to_trim_holds_and_says_why(cache, config, said):
    decision = first(reading(some=1.0), cache, config)
    assert (decision.action, cells(decision), decision.mode) == (Action.NONE, 0, Mode.HOLDING)
    assert said in decision.reason


def test_what_costs_no_fidelity_goes_whatever_budget_and_futility_say():
    cache = snapshot(lossless=640)
    assert cells(first(reading(some=1.0), cache, GovernorConfig(budget_per_min=0.0))) == 640
    looks = pressed(20, some=0.5, headroom=0.03)
    assert all(cells(d) > 0 for d in replay(looks, snapshot(trimmable=640, lossless=640)))


def test_the_budget_is_that_of_any_60_seconds():
    # 1,024 of 4,096 cells; the simulated trims bring no relief, which is another matter.
    config = GovernorConfig(budget_per_min=0.25, step_min=0.2, futile_trims=100)
    looks = [reading(time_s=100.0 + t, some=1.0) for t in (0, 1, 59, 60, 60.5, 61.5)]
    gone = [cells(decision) for decision in replay(looks, snapshot(), config)]
    assert gone == [704, 320, 0, 0, 704, 320]  # the trim of 0 s has left the window after 60 s, not at 60 s


def test_trims_keep_the_cooldown():
    looks = [reading(time_s=100.0 + t, some=1.0) for t in (0.0, 0.125, 0.25, 0.375)]
    decisions = replay(looks, snapshot())
    assert [decision.action.value for decision in decisions] == ["trim", "none", "none", "trim"]
    assert {decision.mode for decision in decisions} == {Mode.TRIMMING}
    assert "cooldown" in decisions[1].reason


@pytest.mark.parametrize(("lossless", "again_s"), [(3200, 0.125), (0, 0.5)], ids=["costless", "at a cost"])
def test_where_headroom_is_short_what_costs_no_fidelity_waits_for_no_effect(lossless, again_s):
    looks = [reading(time_s=100.0 + t, headroom=0.035) for t in (0.0, 0.0625, 0.125, 0.25, 0.5)]
    decisions = replay(looks, snapshot(lossless=lossless))
    trims = [look.time_s for look, it in zip(looks, decisions, strict=True) if it.action is Action.TRIM]
    assert trims[:2] == [100.0, 100.0 + again_s]


# -- when to look again ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headroom", "limit_bytes", "pause"),
    [
        (None, LIMIT_BYTES, 0.2),
        (0.9, LIMIT_BYTES, 0.172),
        (0.29, LIMIT_BYTES, 0.05),  # 250 MB above the line: gone in 0.1 s at the soonest
        (0.05, LIMIT_BYTES, 0.02),
        (0.0, LIMIT_BYTES, 0.02),
        (0.20, 8 * LIMIT_BYTES, 0.2),  # on a large machine the same share is far away
    ],
)
def test_it_looks_the_more_often_the_sooner_the_headroom_could_be_gone(headroom, limit_bytes, pause):
    look = changed(
        reading(),
        headroom_bytes=None if headroom is None else round(headroom * limit_bytes),
        limit_bytes=limit_bytes,
    )
    assert pause_s(CONFIG, look) == pytest.approx(pause)


# -- the cache limit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "gone"),
    [
        (0.5, 2048),
        (0.0, 3200),
        (0.95, 320),
    ],  # 2,000 in whole blocks; down to the floor of 800; the usual step
)
def test_a_cache_limit_is_reached_in_one_trim(limit, gone):
    assert cells(first(reading(some=0.1), snapshot(live=4000), cache_limit=limit)) == gone


def test_a_cache_limit_says_nothing_on_a_calm_machine():
    assert first(reading(some=0.05), snapshot(), cache_limit=0.1).action is Action.NONE
