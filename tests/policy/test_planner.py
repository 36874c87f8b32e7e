"""The ladder as a plan: what goes first, what never goes, and what comes back first."""

from __future__ import annotations

import math
import mmap

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_help import (
    CAN_EVICT,
    CONFIG,
    Described,
    bytes_of,
    cache,
    of_verb,
    planner_of,
    positions,
    sequence,
    snapshot,
    snapshots,
)

from psi_kv_governor.cache import BlobState, Capability, Range, Snapshot, Step, Verb, cells_in
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import SLICE_BYTES
from psi_kv_governor.policy import Policy, get_policy
from psi_kv_governor.policy.ladder import Ladder
from psi_kv_governor.policy.planner import SLICE_S, TRIM_S
from psi_kv_governor.policy.scoring import MOST_BLOCKS, block_size

BLOCK = CONFIG.block_cells
amounts = st.integers(0, 3_000_000)
a_law = settings(max_examples=150, deadline=None)

# -- laws of every trim ------------------------------------------------------------------------------------


@a_law
@given(snapshots(), amounts, st.sampled_from(["window", "random", "hybrid"]))
def test_a_plan_gives_what_is_asked_and_at_most_one_step_or_block_more(now, n_bytes, policy):
    planner = planner_of(policy)
    plan, held = planner.trim(now, n_bytes), planner.holdings(now)
    planned = [bytes_of(step, now) for step in plan.steps]
    assert sum(planned) >= min(n_bytes, held.trimmable_bytes)
    assert sum(planned[:-1]) < n_bytes or not planned  # without its last step it is too little
    of_fidelity = sum(bytes_of(step, now) for step in of_verb(plan, Verb.MASK))
    block_bytes = BLOCK * max(one.cell_bytes for one in now.caches)
    assert of_fidelity < max(0, n_bytes - held.lossless_bytes) + block_bytes or not of_fidelity
    assert plan.max_bytes is not None
    assert n_bytes <= plan.max_bytes < n_bytes + block_bytes


@a_law
@given(snapshots(), amounts)
def test_all_that_can_be_given_is_what_a_plan_without_bound_gives(now, n_bytes):
    planner = planner_of()
    held = planner.holdings(now)
    assert sum(bytes_of(s, now) for s in planner.trim(now, 1 << 40).steps) == held.trimmable_bytes
    assert bool(planner.why_nothing(now)) == (held.trimmable_bytes == 0)


@a_law
@given(snapshots(), amounts, st.sampled_from(["window", "random"]))
def test_floor_and_protection_hold_whatever_is_asked(now, n_bytes, policy):
    planner = planner_of(policy)
    planner.protect(Range(200, 300), None)
    planner.protect(Range(300, 333), 1)
    for step in of_verb(planner.trim(now, n_bytes), Verb.MASK):
        one = next(s for c in now.caches if c.id == step.cache for s in c.sequences if s.id == step.sequence)
        gone = positions(step.ranges)
        assert len(gone) == cells_in(step.ranges)  # disjoint
        assert list(step.ranges) == sorted(step.ranges)
        assert gone <= positions(one.live)
        assert not gone & {*range(CONFIG.sink_cells), *range(200, 300)}
        assert not gone & set(range(one.next_position - CONFIG.window_cells, one.next_position))
        assert not gone & set(range(min(one.head_cells, one.next_position // 2)))
        assert one.id != 1 or not gone & set(range(300, 333))
        context = one.live_cells + one.masked_cells + one.lost_cells
        assert one.live_cells - len(gone) >= max(CONFIG.floor_cells, CONFIG.floor_share * context)


@a_law
@given(snapshots(), amounts)
def test_the_ladder_is_climbed_from_below_and_the_least_recently_used_go_first(now, n_bytes):
    plan = planner_of().trim(now, n_bytes)
    rungs = [_rung(step) for step in plan.steps]
    assert rungs == sorted(rungs)
    for rung in (1, 2, 3):
        used_s = [_used_s(step, now) for step in plan.steps if _rung(step) == rung]
        assert used_s == sorted(used_s)
    for step in plan.steps:
        held = next(one for one in now.caches if one.id == step.cache)
        if step.sequence is not None:
            one = next(one for one in held.sequences if one.id == step.sequence)
            assert one.running == (step.verb is Verb.MASK)
        assert step.verb is not Verb.MASK or held.maskable
    assert len({(s.verb, s.cache, s.sequence, s.blob) for s in plan.steps}) == len(plan.steps)


def _rung(step: Step) -> int:
    if step.verb is Verb.RELEASE:
        return 0
    if step.blob is not None:
        return 1
    return 2 if step.verb is Verb.PARK else 3


def _used_s(step: Step, now: Snapshot) -> float:
    held = next(one for one in now.caches if one.id == step.cache)
    if step.blob is not None:
        return next(blob.last_used_s for blob in held.blobs if blob.id == step.blob)
    return next(one.last_used_s for one in held.sequences if one.id == step.sequence)


@a_law
@given(snapshots(), amounts)
def test_content_is_dropped_only_without_a_place_and_the_floor_holds_for_it_too(now, n_bytes):
    engine = Described(CAN_EVICT, place="")
    for step in planner_of(engine=engine).trim(now, n_bytes).steps:
        assert step.verb in {Verb.RELEASE, Verb.EVICT}
        if step.verb is Verb.EVICT:
            one = next(
                s for c in now.caches if c.id == step.cache for s in c.sequences if s.id == step.sequence
            )
            assert one.live_cells - cells_in(step.ranges) >= CONFIG.floor_cells


@a_law
@given(snapshots(), st.integers(0, 30_000_000), st.sampled_from(["window", "keydiff"]))
def test_a_restore_brings_back_the_best_of_what_is_masked_and_no_more_than_a_slice(now, n_bytes, policy):
    planner = planner_of(policy)
    planner.trim(now, 1 << 40)  # so that something is known of some
    plan = planner.restore(now, n_bytes)
    assert (plan.max_bytes, plan.deadline_s) == (min(n_bytes, SLICE_BYTES), SLICE_S)
    masked = {(c.id, s.id): positions(s.masked) for c in now.caches for s in c.sequences}
    planned = 0
    for step in plan.steps:
        assert step.verb is Verb.UNMASK
        assert positions(step.ranges) <= masked[step.cache, step.sequence]
        planned += bytes_of(step, now)
    block_bytes = BLOCK * max(one.cell_bytes for one in now.caches)
    all_masked = planner.holdings(now).masked_bytes
    assert min(n_bytes, SLICE_BYTES, all_masked) <= planned < min(n_bytes, SLICE_BYTES) + block_bytes or (
        planned == 0
    )


@a_law
@given(snapshots(), snapshots(), amounts)
def test_sequences_that_change_between_two_plans_do_no_harm(before, after, n_bytes):
    """Shorter, cleared, gone, or other ones under the same numbers."""
    planner = planner_of("hybrid")
    planner.trim(before, 1 << 40)
    planner.holdings(after)
    planner.restore(after, n_bytes)
    for step in of_verb(planner.trim(after, n_bytes), Verb.MASK):
        one = next(
            s for c in after.caches if c.id == step.cache for s in c.sequences if s.id == step.sequence
        )
        assert positions(step.ranges) <= positions(one.live)


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


# -- policies that fail, and sequences that are gone -------------------------------------------------------


class Broken(Policy):
    """Divides by zero."""

    name = "broken"
    source = "a test"

    def score(self, blocks, next_position, evidence):
        return np.array([1 // 0 for _ in blocks], dtype=np.float64)


class Needy(Policy):
    """Needs what this cache can't give."""

    name = "needy"
    source = "a test"
    needs = frozenset({"key_norms"})

    def score(self, blocks, next_position, evidence):
        raise AssertionError("it was asked all the same")


def test_a_policy_that_fails_is_told_and_the_oldest_go():
    told = []
    plan = planner_of(Broken(), complain=told.append).trim(snapshot(cache(sequence())), 1600)
    assert plan.steps[0].ranges == (Range(16, 32),)
    assert told == [
        "the policy broken failed (integer division or modulo by zero): the oldest blocks go instead"
    ]


def test_a_policy_that_the_cache_cannot_serve_is_told_and_the_oldest_go(monkeypatch):
    from psi_kv_governor.engines.simulated.evidence import PaperEvidence

    monkeypatch.setattr(PaperEvidence, "why_not", lambda self, kind: "its keys are q4_0")
    told = []
    plan = planner_of(Needy(), complain=told.append).trim(snapshot(cache(sequence())), 1600)
    assert plan.steps[0].ranges == (Range(16, 32),)
    assert told == ["the policy needy can't be used with this cache (its keys are q4_0)"]


def test_a_sequence_that_is_gone_gives_nothing_and_the_others_give_all():
    engine = Described()
    engine.gone.add((1, 0))
    now = snapshot(cache(sequence(0), sequence(1)))
    plan = planner_of(engine=engine).trim(now, 1 << 30)
    assert [step.sequence for step in plan.steps] == [1]


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


def test_saved_states_are_parked_and_nothing_else():
    blobs = (BlobState(id=7, n_bytes=500, parked=False), BlobState(id=8, n_bytes=500, parked=True))
    now = snapshot(cache(sequence(running=False), blobs=blobs))
    plan = planner_of().park_blobs(now)
    assert plan is not None
    assert plan.steps == (Step(verb=Verb.PARK, cache=1, blob=7),)
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
