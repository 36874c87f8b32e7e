"""Sequences that can only stand still whole go last, and only when memory is about to be gone."""

import msgspec
import pytest
from planner_help import CONFIG, Described

from psi_kv_governor.cache import CacheState, Capabilities, Capability, Range, SequenceState, Snapshot, Verb
from psi_kv_governor.policy import get_policy
from psi_kv_governor.policy.planner import Planner

ABLE = Capability(able=True)
CAN = Capabilities(release=ABLE, park=ABLE, mask=ABLE, blobs=Capability(able=False, why="none"))
IDLE = SequenceState(id=0, next_position=100, live=(Range(0, 100),))


def running(number: int, order: int | None) -> SequenceState:
    return SequenceState(
        id=number,
        next_position=100,
        live=(Range(0, 100),),
        running=True,
        preempt_order=order,
        last_used_s=5.0,
    )


def snapshot(*sequences: SequenceState) -> Snapshot:
    cache = CacheState(
        id=0,
        name="c",
        pid=1,
        capacity_cells=1000,
        cell_bytes=10,
        row_bytes=10,
        resident_bytes=1000,
        maskable=False,
        sequences=sequences,
    )
    return Snapshot(time_s=9.0, caches=(cache,))


ALL = snapshot(IDLE, running(1, None), running(2, 1), running(3, 0))


@pytest.fixture
def planner() -> Planner:
    return Planner(get_policy("window"), Described(CAN), CONFIG)


def steps(planner: Planner, n_bytes: int, *, urgent: bool = True, of: Snapshot = ALL):
    return [(step.verb, step.sequence) for step in planner.trim(of, n_bytes, urgent=urgent).steps]


def test_they_go_after_what_nobody_uses_and_in_the_engines_order(planner):
    assert steps(planner, 3000) == [(Verb.PARK, 0), (Verb.MASK, 3), (Verb.MASK, 2)]
    assert steps(planner, 1500) == [(Verb.PARK, 0), (Verb.MASK, 3)]


def test_none_stands_still_where_memory_is_merely_short(planner):
    assert steps(planner, 3000, urgent=False) == [(Verb.PARK, 0)]


def test_they_count_as_what_can_be_given_and_not_as_free_of_cost(planner):
    holdings = planner.holdings(ALL)
    assert (holdings.trimmable_bytes, holdings.lossless_bytes) == (3000, 1000)


def test_who_stands_still_comes_back_as_what_is_masked(planner):
    still = msgspec.structs.replace(running(3, None), live=(), masked=(Range(0, 100),), running=False)
    (step, *_) = planner.restore(snapshot(running(1, None), still), 1 << 20).steps
    assert (step.verb, step.sequence) == (Verb.UNMASK, 3)


def test_an_engine_that_can_not_stop_them_is_not_asked_to():
    why = Capability(able=False, why="its scheduler passes over nothing")
    planner = Planner(get_policy("window"), Described(msgspec.structs.replace(CAN, mask=why)), CONFIG)
    assert steps(planner, 3000) == [(Verb.PARK, 0)]
