"""The law on single readings: what it asks for, in which mode, and for which reason."""

from __future__ import annotations

import math

import msgspec
import pytest

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
from psi_kv_governor.pressure.reading import Reading, one_level

LIMIT_BYTES = 1_000_000_000
CELL_BYTES = 1_000
CONFIG = GovernorConfig()


def reading(
    time_s: float = 100.0,
    some: float = 0.0,
    headroom: float | None = None,
    interval_s: float = 1.0,
    *,
    full: float | None = None,
    own: float = 0.0,
):
    """`headroom` is a share of the limit; None leaves headroom and limit unknown."""
    return one_level(
        time_s=time_s,
        interval_s=interval_s,
        some=some,
        full=some / 4 if full is None else full,
        headroom_bytes=None if headroom is None else round(headroom * LIMIT_BYTES),
        limit_bytes=None if headroom is None else LIMIT_BYTES,
        own=own,
    )


def changed(look: Reading, **change) -> Reading:
    """`look` with other figures, of the reading or of its one level."""
    of_reading = {name: value for name, value in change.items() if name in Reading.__struct_fields__}
    level = msgspec.structs.replace(
        look.levels[0], **{name: value for name, value in change.items() if name not in of_reading}
    )
    return msgspec.structs.replace(look, levels=(level,), **of_reading)


def snapshot(
    live: int = 4096,
    spilled: int = 0,
    lost: int = 0,
    trimmable: int | None = None,
    *,
    lossless: int = 0,
    block: int = 64,
):
    """In cells of 1,000 bytes. The planner keeps 320 protected cells, and a fifth of the context."""
    kept = max(320, -(-(live + spilled + lost) // 5))
    return CacheSnapshot(
        live_bytes=live * CELL_BYTES,
        masked_bytes=spilled * CELL_BYTES,
        lost_bytes=lost * CELL_BYTES,
        trimmable_bytes=(max(0, live - kept) if trimmable is None else trimmable) * CELL_BYTES,
        lossless_bytes=lossless * CELL_BYTES,
        step_bytes=block * CELL_BYTES,
    )


def cells(decision: Decision) -> int:
    return decision.n_bytes // CELL_BYTES


def first(look: Reading, cache: CacheSnapshot, config: GovernorConfig = CONFIG, **more) -> Decision:
    return decide(config, LawState(), look, cache, **more)[0]


def follow(looks: list[Reading], cache: CacheSnapshot, config: GovernorConfig = CONFIG) -> list[Decision]:
    """As `replay`, with a cache that does what it is told."""
    state, decisions = LawState(), []
    for look in looks:
        decision, state = decide(config, state, look, cache)
        decisions.append(decision)
        gone = cells(decision) if decision.action is Action.TRIM else -cells(decision)
        live, spilled = cache.live_bytes // CELL_BYTES - gone, cache.masked_bytes // CELL_BYTES + gone
        cache = snapshot(live=live, spilled=spilled)
    return decisions


def replay(looks: list[Reading], cache: CacheSnapshot, config: GovernorConfig = CONFIG) -> list[Decision]:
    state, decisions = LawState(), []
    for look in looks:
        decision, state = decide(config, state, look, cache)
        decisions.append(decision)
    return decisions


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
