"""The law on single readings: when it gives up, how much, and for which reason."""

from __future__ import annotations

import math

import msgspec
import pytest
from law_help import CONFIG, LIMIT_BYTES, cells, changed, first, follow, reading, replay, snapshot

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import (
    Action,
    LawState,
    Mode,
    decide,
    pause_s,
)
from psi_kv_governor.pressure.reading import Reading

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


# -- acute -------------------------------------------------------------------------------------------------


def falling(steps: int, by_share: float, start: float = 0.5, gap_s: float = 0.02) -> list[Reading]:
    """Headroom that goes down by so much of the limit with every reading."""
    return [reading(time_s=100.0 + i * gap_s, headroom=start - i * by_share) for i in range(steps)]


def test_full_stall_is_answered_with_one_large_step():
    chronic, acute = (first(reading(some=0.6, full=full, headroom=0.1), snapshot()) for full in (0.39, 0.40))
    assert (cells(chronic), chronic.urgent) == (512, False)  # 15.6 % of 3,276
    assert (cells(acute), acute.urgent) == (1664, True)  # half of it
    assert "all stand still for 40% of the time" in acute.reason


def test_full_stall_with_plenty_of_headroom_is_left_alone():
    assert first(reading(some=0.9, full=0.9, headroom=0.31), snapshot()).action is Action.NONE


def test_headroom_that_falls_to_its_line_is_acted_upon_before_it_is_there():
    looks = falling(20, by_share=0.02)  # 1 GB/s: a quarter of a second ahead is 0.25 of the limit
    decisions = replay(looks, snapshot())
    first_trim = next(i for i, d in enumerate(decisions) if d.action is Action.TRIM)
    assert looks[first_trim].headroom_bytes > 5 * 0.04 * LIMIT_BYTES
    assert decisions[first_trim].urgent
    assert "falling by 1000 MB/s" in decisions[first_trim].reason


def test_what_this_process_takes_itself_is_no_fall():
    """It opens a context, or loads a state: hundreds of MB in a moment, and nobody is to be feared."""
    looks = [
        msgspec.structs.replace(look, own_resident_bytes=100_000_000 + i * 20_000_000)
        for i, look in enumerate(falling(20, by_share=0.02))
    ]
    assert [cells(d) for d in replay(looks, snapshot())] == [0] * 20


def test_headroom_that_falls_slowly_is_not_acute():
    looks = falling(40, by_share=0.0001, start=0.044)  # 5 MB/s: a model that fills its own cache
    decisions = replay(looks, snapshot())
    trim = next(d for d in decisions if d.action is Action.TRIM)
    assert not trim.urgent


def test_half_of_the_line_is_acute_whatever_the_rate():
    assert first(reading(headroom=0.0199), snapshot()).urgent
    assert not first(reading(headroom=0.0201), snapshot()).urgent


def test_an_acute_step_covers_what_is_missing_and_what_goes_in_half_a_second():
    cache = snapshot(live=120_320)  # 120 MB trimmable, of which half is 60 MB
    decision = next(d for d in replay(falling(18, by_share=0.006, start=0.12), cache) if cells(d))
    assert cells(decision) == pytest.approx(150_000 + 40_000 - 108_000, rel=0.01)  # with 108 MB left


def test_one_glance_is_no_fall():
    assert first(reading(headroom=0.05), snapshot()).action is Action.NONE


def test_headroom_that_jumps_once_and_back_is_no_fall():
    """As seen beside file copies in a small cgroup: pages that become active for a moment."""
    shares = (0.36, 0.36, 0.06, 0.36, 0.07, 0.42, 0.05, 0.41)
    looks = [reading(time_s=100.0 + i / 50, headroom=share) for i, share in enumerate(shares)]
    assert [cells(decision) for decision in replay(looks, snapshot())] == [0] * 8


def test_large_steps_wait_for_a_window_of_stall_only():
    looks = [reading(time_s=100.0 + t, some=1.0, full=1.0) for t in (0.0, 0.05, 0.125, 0.1875, 0.25)]
    assert [cells(d) > 0 for d in replay(looks, snapshot())] == [True, False, True, False, True]


def test_a_small_step_that_takes_effect_is_given_more_time():
    stalls = ((0.0, 0.8), (0.375, 0.39), (0.5, 0.39), (0.625, 0.39))
    looks = [reading(time_s=100.0 + t, some=some) for t, some in stalls]
    assert [cells(d) > 0 for d in replay(looks, snapshot())] == [True, False, False, True]


# -- its own doing -----------------------------------------------------------------------------------------


def test_stall_while_the_governor_itself_was_at_work_is_no_reason_to_trim():
    assert first(reading(some=0.5, full=0.5, own=0.45), snapshot()).action is Action.NONE
    assert first(reading(some=0.5, own=0.3), snapshot()).action is Action.TRIM  # the rest is another's


def test_headroom_that_a_restore_took_is_not_falling():
    quiet = [reading(time_s=100.0 + t, headroom=0.5) for t in range(6)]
    after = [reading(time_s=105.02, headroom=0.30, own=0.5), reading(time_s=105.04, headroom=0.30)]
    decisions = replay([*quiet, *after], snapshot(live=3040, spilled=960))
    assert [d.action for d in decisions[5:]] == [Action.RESTORE, Action.NONE, Action.NONE]


# -- futility ----------------------------------------------------------------------------------------------


def pressed(n: int, begin_s: float = 100.0, some: float = 0.5, headroom: float = 0.03) -> list[Reading]:
    """Two readings a second."""
    return [reading(time_s=begin_s + i / 2, some=some, headroom=headroom, interval_s=0.5) for i in range(n)]


def test_after_a_few_trims_without_relief_the_rest_is_kept():
    decisions = follow(pressed(20), snapshot())
    assert [cells(d) > 0 for d in decisions] == [True] * 4 + [False] * 16
    assert decisions[4].mode is Mode.HOLDING
    assert "4 trims in a row brought no relief: somebody takes what is returned" in decisions[4].reason


def test_after_a_while_one_more_is_tried():
    trims = [i / 2 for i, d in enumerate(follow(pressed(140), snapshot())) if cells(d)]
    assert trims == [0.0, 0.5, 1.0, 1.5, 31.5, 61.5]


@pytest.mark.parametrize("relief", [{"some": 0.2}, {"headroom": 0.29}], ids=str)
def test_any_relief_starts_the_count_anew(relief):
    looks = [*pressed(3), *pressed(3, 101.5, **relief), *pressed(4, 103.0)]
    assert sum(cells(d) > 0 for d in follow(looks, snapshot(live=100_000))) >= 6


def test_a_stall_that_stays_is_no_relief_however_long_it_takes_to_count():
    """It was pressure half a second after it began: what was lost before that is not lost in less time."""
    config = GovernorConfig(high=0.5, low=0.5, futile_trims=1, headroom_low=0.0, lead_s=0.0)
    looks = [reading(time_s=100.0 + i / 50, some=0.5, headroom=0.2, interval_s=0.02) for i in range(200)]
    assert sum(cells(d) > 0 for d in follow(looks, snapshot(), config)) == 1


def test_a_hold_ends_when_the_pressure_does():
    looks = [*pressed(10), reading(time_s=106.0, headroom=0.2), reading(time_s=107.0, some=0.5, headroom=0.2)]
    assert [cells(d) > 0 for d in follow(looks, snapshot())][-2:] == [False, True]


def test_a_trim_that_the_engine_did_not_make_is_not_futile():
    assert all(cells(d) > 0 for d in replay(pressed(10), snapshot(live=100_000)))


# -- noise -------------------------------------------------------------------------------------------------


def busy(seconds: int, some: float, headroom: float) -> list[Reading]:
    return [reading(time_s=100.0 + i, some=some, headroom=headroom, interval_s=1.0) for i in range(seconds)]


def test_the_high_threshold_follows_the_noise_of_a_machine_with_plenty_free():
    short = reading(time_s=1000.0, some=0.15, headroom=0.2)
    quiet, noisy = (replay([*busy(300, some, 0.6), short], snapshot())[-1] for some in (0.01, 0.08))
    assert quiet.action is Action.TRIM
    assert noisy.action is Action.NONE
    assert replay([*busy(300, 0.08, 0.6), reading(time_s=1000.0, some=0.31, headroom=0.2)], snapshot())[
        -1
    ].n_bytes


def test_noise_is_not_learned_where_memory_is_short():
    looks = [*busy(300, 0.08, 0.2), reading(time_s=1000.0, some=0.12, headroom=0.2)]
    assert replay(looks, snapshot())[-1].action is Action.TRIM


def test_nobody_can_teach_it_more_than_the_most():
    looks = [*busy(600, 1.0, 0.6), reading(time_s=1000.0, some=0.30, headroom=0.2)]
    assert replay(looks, snapshot())[-1].action is Action.TRIM


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
