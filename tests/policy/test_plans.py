"""What plans look like: who gives first, what is dropped, and what comes back."""

from __future__ import annotations

import math
import mmap

import msgspec
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from planner_help import (
    CAN_EVICT,
    CONFIG,
    Described,
    cache,
    planner_of,
    positions,
    sequence,
    snapshot,
)

from psi_kv_governor.cache import BlobState, Capability, Range, Step, Verb, cells_in
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.policy import get_policy
from psi_kv_governor.policy.ladder import Ladder
from psi_kv_governor.policy.planner import SLICE_S, TRIM_S
from psi_kv_governor.policy.scoring import MOST_BLOCKS, block_size

BLOCK = CONFIG.block_cells
amounts = st.integers(0, 3_000_000)
a_law = settings(max_examples=150)

# -- and what they look like -------------------------------------------------------------------------------


def test_what_costs_nothing_goes_before_what_is_being_decoded():
    blobs = (
        BlobState(id=7, n_bytes=500, parked=False, last_used_s=3.0),
        BlobState(id=8, n_bytes=500, parked=False, last_used_s=2.0),
        BlobState(id=9, n_bytes=500, parked=True),
    )
    now = snapshot(
        cache(sequence(0), sequence(1, 100, running=False, last_used_s=5.0), blobs=blobs),
        cache(sequence(0, 100, running=False, last_used_s=4.0), number=2, free_resident_bytes=300),
    )
    plan = planner_of().trim(now, 300 + 1000 + 20_000 + 1)
    assert plan.steps == (
        Step(verb=Verb.RELEASE, cache=2),
        Step(verb=Verb.PARK, cache=1, blob=8),
        Step(verb=Verb.PARK, cache=1, blob=7),
        Step(verb=Verb.PARK, cache=2, sequence=0),
        Step(verb=Verb.PARK, cache=1, sequence=1),
        Step(verb=Verb.MASK, cache=1, sequence=0, ranges=(Range(16, 24),)),
    )
    assert plan.deadline_s == math.inf
    assert planner_of().trim(now, 1, urgent=True).deadline_s == TRIM_S


def test_of_an_idle_sequence_only_so_many_blocks_go_as_are_asked_for():
    now = snapshot(cache(sequence(running=False)))
    assert planner_of().trim(now, 1).steps == (
        Step(verb=Verb.PARK, cache=1, sequence=0, ranges=(Range(0, 8),)),
    )
    parked = snapshot(cache(sequence(running=False, parked_bytes=800)))
    assert planner_of().trim(parked, 801).steps == (
        Step(verb=Verb.PARK, cache=1, sequence=0, ranges=(Range(0, 24),)),
    )


def test_several_running_sequences_give_alike():
    now = snapshot(cache(*(sequence(number) for number in range(4))))
    gone = {step.sequence: cells_in(step.ranges) for step in planner_of().trim(now, 4 * 8 * 100).steps}
    assert gone == {0: 8, 1: 8, 2: 8, 3: 8}
    assert cells_in(planner_of().trim(now, 1).steps[0].ranges) == 8  # one block, of one of them


def test_a_few_cells_above_the_floor_are_not_worth_a_trim():
    at_the_floor = snapshot(cache(sequence(0, 64 + 3, masked=())))
    assert planner_of().holdings(at_the_floor).trimmable_bytes == 0
    assert planner_of().trim(at_the_floor, 10_000).steps == ()


def test_a_cache_that_cannot_be_masked_gives_its_idle_sequences_alone():
    now = snapshot(
        cache(
            sequence(0),
            sequence(1, running=False),
            maskable=False,
            why_not_maskable="flash attention is off",
        )
    )
    assert planner_of().trim(now, 1 << 30).steps == (Step(verb=Verb.PARK, cache=1, sequence=1),)
    left = snapshot(cache(sequence(0), maskable=False, why_not_maskable="flash attention is off"))
    assert planner_of().why_nothing(left) == "flash attention is off"


@pytest.mark.parametrize(
    ("place", "evict", "drops"),
    [("", False, True), ("", True, True), ("/there", False, False), ("/there", True, True)],
)
def test_content_is_dropped_where_no_place_exists_or_where_it_was_asked_for(place, evict, drops):
    config = msgspec.structs.replace(CONFIG, evict=evict)
    planner = planner_of(config=config, engine=Described(CAN_EVICT, place))
    now = snapshot(cache(sequence(0), sequence(1, running=False)))
    plan = planner.trim(now, 1)
    assert [step.verb for step in plan.steps] == ([Verb.EVICT] if drops else [])
    if drops:
        assert plan.steps[0].sequence == 1  # what nobody waits for
    else:
        assert planner.why_nothing(now) == "there is no place to park"


def test_content_is_never_dropped_where_it_can_be_parked():
    able = msgspec.structs.replace(CAN_EVICT, park=Capability(able=True))
    config = msgspec.structs.replace(CONFIG, evict=True)
    plan = planner_of(config=config, engine=Described(able)).trim(snapshot(cache(sequence())), 1 << 30)
    assert plan.steps == ()  # it can't be masked, and nothing else is left


@pytest.mark.parametrize(
    ("now", "why"),
    [
        (snapshot(), "the cache is empty"),
        (snapshot(cache(sequence(0, 40))), "all 40 live cells are protected: 16 first and 32 last ones"),
        (snapshot(cache(sequence(0, 60))), "the floor of 64 cells holds: 60 are live"),
        (snapshot(cache(sequence(0, 66))), "less than a block of 8 cells is left above the floor"),
        (snapshot(cache(sequence(running=False, parked_bytes=100_000))), "all that can be parked is parked"),
    ],
)
def test_a_trim_that_gives_nothing_says_why(now, why):
    planner = planner_of()
    assert planner.trim(now, 1 << 30).steps == ()
    assert planner.why_nothing(now).startswith(why)


def test_a_long_system_prompt_leaves_something_to_give():
    now = snapshot(cache(sequence(head_cells=990)))
    assert planner_of().trim(now, 1).steps[0].ranges == (Range(500, 508),)


def test_marks_hold_until_they_are_taken_off():
    planner, now = planner_of(), snapshot(cache(sequence(), sequence(1)))
    planner.protect(Range(0, 200), None)
    planner.protect(Range(150, 300), 1)
    gone = {step.sequence: positions(step.ranges) for step in planner.trim(now, 1 << 30).steps}
    assert min(gone[0]) == 200
    assert min(gone[1]) == 300
    planner.unprotect(Range(100, 180), 1)  # there is no such mark of that one alone
    planner.unprotect(Range(0, 10_000), None)
    assert planner.marks == {}


def test_no_more_goes_than_whole_blocks_of_the_configuration():
    """A larger block, as a scattered policy has it for short rows, would break the law's floor and budget."""
    now = snapshot(cache(sequence(), row_bytes=64, cell_bytes=1))
    for wanted in (1, 8, 9, 200):
        plan = planner_of("random").trim(now, wanted)
        assert cells_in(plan.steps[0].ranges) == -(-wanted // 8) * 8


@pytest.mark.parametrize(
    ("row_bytes", "capacity", "expected"),
    [
        (384, 4096, 64),  # SmolLM2-135M in f16: six pages of 4 KiB exactly
        (204, 4096, 128),  # the same in q8_0
        (2048, 8192, 64),  # an 8B Llama
        (2048, 131_072, 512),  # 256 blocks at most
        (34, 4096, 768),
    ],
)
def test_a_lone_block_fills_whole_pages(row_bytes, capacity, expected, monkeypatch):
    monkeypatch.setattr(mmap, "PAGESIZE", 4096)
    assert block_size(get_policy("random"), 64, row_bytes, capacity) == expected
    assert block_size(get_policy("window"), 64, row_bytes, capacity) == 64  # its blocks lie side by side
    assert capacity / block_size(get_policy("random"), 64, row_bytes, capacity) <= MOST_BLOCKS


# -- back again --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["keynorm", "keydiff", "attention", "random", "window"])
def test_what_was_thought_best_comes_back_first(policy):
    planner, now = planner_of(policy), snapshot(cache(sequence()))
    gone = planner.trim(now, 1 << 30).steps[0].ranges
    live = tuple(Range(a, b) for a, b in ((0, gone[0].start), (gone[-1].stop, 1000)))
    away = sequence(live=live, masked=gone)
    masked = snapshot(cache(away))
    back = planner.restore(masked, 5 * 8 * 100).steps[0].ranges
    blocks = sorted(
        (Range(s, min(s // 8 * 8 + 8, run.stop)) for run in gone for s in range(run.start, run.stop, 8)),
        key=lambda part: -planner._scores.last(1, away, part),
    )
    worst_back = min(
        planner._scores.last(1, away, part) for part in blocks if positions([part]) <= positions(back)
    )
    best_left = max(
        planner._scores.last(1, away, part) for part in blocks if not positions([part]) & positions(back)
    )
    assert worst_back >= best_left
    assert cells_in(back) == 40


def test_scores_of_what_is_gone_or_was_decoded_anew_are_forgotten():
    planner, now = planner_of("keydiff"), snapshot(cache(sequence(), sequence(1)))
    planner.trim(now, 1 << 30)
    shorter = sequence(0, 500)
    planner.holdings(snapshot(cache(shorter)))
    assert planner._scores.last(1, shorter, Range(400, 408)) > -np.inf
    assert planner._scores.last(1, shorter, Range(600, 608)) == -np.inf
    assert planner._scores.last(1, sequence(1), Range(400, 408)) == -np.inf
    assert len(planner._scores._known) == 1


# -- beforehand --------------------------------------------------------------------------------------------


def test_pages_of_free_cells_are_asked_for_when_there_are_some():
    assert planner_of().release(snapshot(cache(free_resident_bytes=(1 << 20) - 1))) is None
    plan = planner_of().release(snapshot(cache(free_resident_bytes=1 << 20)))
    assert plan is not None
    assert plan.steps == (Step(verb=Verb.RELEASE, cache=1),)


def test_pages_of_free_cells_that_are_used_next_are_left_alone():
    used_soon = cache(free_resident_bytes=3 << 20, free_soon_used_bytes=(2 << 20) + 1)
    assert planner_of().release(snapshot(used_soon)) is None


def test_saved_states_are_parked_and_nothing_else():
    blobs = (BlobState(id=7, n_bytes=500, parked=False), BlobState(id=8, n_bytes=500, parked=True))
    now = snapshot(cache(sequence(running=False), blobs=blobs))
    plan = planner_of().park_blobs(now)
    assert plan is not None
    assert plan.steps == (Step(verb=Verb.PARK, cache=1, blob=7),)
    kept = planner_of().park_blobs(now, kept=True)
    assert kept is not None
    assert kept.steps == (Step(verb=Verb.WRITE_BEHIND, cache=1, blob=7),)
    assert planner_of(engine=Described(CAN_EVICT)).park_blobs(now) is None


def test_what_may_go_is_written_beforehand():
    plan = planner_of().write_behind(snapshot(cache(sequence())))
    assert plan is not None
    assert plan.steps == (Step(verb=Verb.WRITE_BEHIND, cache=1, sequence=0, ranges=(Range(16, 968),)),)
    assert plan.deadline_s == SLICE_S
    assert planner_of(engine=Described(CAN_EVICT)).write_behind(snapshot(cache(sequence()))) is None


def test_the_law_sees_bytes():
    blobs = (BlobState(id=7, n_bytes=500, parked=True), BlobState(id=8, n_bytes=50, parked=False))
    now = snapshot(
        cache(
            sequence(0, live=(Range(0, 800),), masked=(Range(800, 900),), lost=(Range(900, 1000),)),
            sequence(1, 100, running=False, parked_bytes=1000, last_used_s=9.0),
            blobs=blobs,
            free_resident_bytes=300,
        )
    )
    held = Ladder(now, Described().description, GovernorConfig()).holdings()
    lossless = 300 + 50 + 9_000
    assert held.lossless_bytes == lossless
    assert held.trimmable_bytes == lossless + (800 - 256) * 100  # above the floor
    assert (held.live_bytes, held.masked_bytes, held.lost_bytes) == (90_000 + 550, 10_000, 10_000)
    assert (held.step_bytes, held.last_used_s) == (6400, 9.0)
