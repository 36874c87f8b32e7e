"""Intervals, and the search for the largest that passes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psikv_bench.intervals import share_of
from psikv_bench.search import largest


@pytest.mark.parametrize(
    ("hits", "runs", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval_is_that_of_the_literature(hits, runs, low, high):
    found = share_of(hits, runs)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 2000).flatmap(lambda runs: st.tuples(st.integers(0, runs), st.just(runs))))
def test_the_interval_holds_the_share_and_is_symmetric(counts):
    hits, runs = counts
    found, other = share_of(hits, runs), share_of(runs - hits, runs)
    assert 0.0 <= found.low <= found.mean <= found.high <= 1.0
    assert (1 - other.high, 1 - other.low) == pytest.approx((found.low, found.high))


def test_without_runs_nothing_is_known_and_nonsense_is_refused():
    assert (share_of(0, 0).low, share_of(0, 0).high) == (0.0, 1.0)
    for hits, runs in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="is no count"):
            share_of(hits, runs)


STEP = 256


@given(
    limit=st.integers(0, 200).map(lambda steps: steps * STEP),
    start=st.integers(1, 50_000),
    most=st.integers(1, 150).map(lambda steps: steps * STEP),
    resolution=st.sampled_from([1.0001, 1.15, 2.0]),
)
def test_the_search_finds_the_largest_to_its_resolution_and_tests_nothing_twice(
    limit, start, most, resolution
):
    tested = []

    def passes(size):
        tested.append(size)
        return size <= limit

    found = largest(passes, start, step=STEP, most=most, resolution=resolution)
    assert len(set(tested)) == len(tested) <= 20
    assert all(size % STEP == 0 and STEP <= size <= most for size in tested)
    truth = min(limit, most)
    assert found <= truth
    if found:
        assert truth < max(found * resolution, found + STEP) or truth == found
        assert found in tested
    else:
        assert STEP in tested
        assert truth < STEP


def test_a_search_that_starts_too_high_goes_down():
    tested = []
    found = largest(
        lambda size: tested.append(size) or size <= 512, 4096, step=STEP, most=8192, resolution=1.15
    )
    assert found == 512
    assert tested == [4096, 2048, 1024, 512, 768]
