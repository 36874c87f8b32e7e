"""The law when it is urgent, when nothing helps, and on a machine that is never still."""

from __future__ import annotations

import msgspec
import pytest
from law_help import LIMIT_BYTES, cells, first, follow, pressed, reading, replay, snapshot

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import (
    Action,
    Mode,
)
from psi_kv_governor.pressure.reading import Reading

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
