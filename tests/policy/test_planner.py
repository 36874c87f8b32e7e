"""The ladder as a plan: what goes first, what never goes, and what comes back first."""

from __future__ import annotations

import numpy as np
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

from psi_kv_governor.cache import Range, Snapshot, Step, Verb, cells_in
from psi_kv_governor.control import SLICE_BYTES
from psi_kv_governor.policy import Policy
from psi_kv_governor.policy.planner import SLICE_S

BLOCK = CONFIG.block_cells
amounts = st.integers(0, 3_000_000)
a_law = settings(max_examples=150)

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
