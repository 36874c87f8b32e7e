"""Each position is in exactly one place: the cache, the store, or lost."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psi_kv_governor.ledger import LIVE, LOST, SPILLED, Ledger
from psi_kv_governor.policy.base import Range

CAPACITY = 64
PLACES = (LIVE, SPILLED, LOST)

marks = st.tuples(
    st.just("mark"), st.integers(0, CAPACITY), st.integers(0, CAPACITY), st.sampled_from(PLACES)
)
cuts = st.tuples(st.just("truncate"), st.integers(-3, CAPACITY + 3))
grows = st.tuples(st.just("extend"), st.integers(0, 5))
steps = st.lists(marks | cuts | grows, max_size=30)


def play(script) -> tuple[Ledger, list[int]]:
    """The ledger after `script`, beside a plain list that was led through the same."""
    ledger, model = Ledger(CAPACITY), []
    for step in script:
        if step[0] == "truncate":
            ledger.truncate(step[1])
            model = model[: max(0, step[1])]
            continue
        if step[0] == "extend":
            cells = min(step[1], CAPACITY - len(model))
            ledger.extend(cells)
            model += [LIVE] * cells
            continue
        start, stop = sorted(step[1:3])
        start = min(start, len(model))
        ledger.mark(Range(start, stop), step[3])
        model[start:stop] = [step[3]] * (stop - start)
    return ledger, model


def spread(ledger: Ledger, place: int, within: Range | None = None) -> list[int]:
    return [position for part in ledger.ranges(place, within) for position in range(*part)]


@settings(max_examples=150, deadline=None)
@given(steps)
def test_the_ranges_of_the_three_places_partition_the_sequence(script):
    ledger, model = play(script)
    assert len(ledger) == len(model)
    for place in PLACES:
        assert spread(ledger, place) == [p for p, here in enumerate(model) if here == place]
        assert ledger.count(place) == model.count(place)
    assert sum(ledger.count(place) for place in PLACES) == len(ledger)
    assert ledger.holes() == len(model) - model.count(LIVE)


@settings(max_examples=150, deadline=None)
@given(steps, st.integers(0, CAPACITY), st.integers(0, CAPACITY))
def test_a_look_at_a_part_is_the_part_of_the_whole(script, one, other):
    ledger, model = play(script)
    within = Range(*sorted((one, other)))
    for place in PLACES:
        expected = [p for p in range(within.start, min(within.stop, len(model))) if model[p] == place]
        assert spread(ledger, place, within) == expected
    assert ledger.holes(within) == sum(here != LIVE for here in model[within.start : within.stop])


@settings(max_examples=80, deadline=None)
@given(steps)
def test_ranges_are_in_order_not_empty_and_do_not_touch(script):
    ledger, _ = play(script)
    for place in PLACES:
        parts = list(ledger.ranges(place))
        assert all(part.cells > 0 for part in parts)
        assert all(a.stop < b.start for a, b in pairwise(parts))


def test_what_was_truncated_does_not_come_back_with_new_tokens():
    ledger = Ledger(8)
    ledger.mark(Range(0, 8), SPILLED)
    ledger.truncate(2)
    ledger.mark(Range(2, 4), LIVE)
    assert (len(ledger), ledger.count(SPILLED), ledger.count(LIVE)) == (4, 2, 2)


@pytest.mark.parametrize("positions", [Range(-1, 2), Range(0, 9), Range(3, 2)])
def test_positions_outside_the_cache_are_refused(positions):
    ledger = Ledger(8)
    ledger.mark(Range(0, 4), LIVE)
    with pytest.raises(ValueError, match="outside the cache of 8 cells"):
        ledger.mark(positions, LIVE)
    assert ledger.count(LIVE) == 4


def test_a_gap_behind_the_end_is_refused():
    ledger = Ledger(8)
    with pytest.raises(ValueError, match="would leave a hole after 0"):
        ledger.mark(Range(1, 2), LIVE)


def test_a_new_ledger_is_empty():
    ledger = Ledger(8)
    assert (len(ledger), ledger.holes(), list(ledger.ranges(LIVE))) == (0, 0, [])
    assert [ledger.count(place) for place in PLACES] == [0, 0, 0]
