"""From values of positions to scores of blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psi_kv_governor.policy import Range
from psi_kv_governor.policy.pool import highest, ranks, top_mean, without_gaps

BLOCKS = [Range(10, 14), Range(20, 28), Range(30, 31)]
NAN = np.nan


def give_of(values: dict[int, float]):
    def give(part: Range) -> np.ndarray:
        return np.array([values.get(position, NAN) for position in range(*part)])

    return give


def test_the_top_share_of_a_block_is_averaged():
    values = {position: float(position % 10) for position in range(10, 40)}
    assert top_mean(BLOCKS, give_of(values), share=0.5).tolist() == [2.5, 5.5, 0.0]
    assert top_mean(BLOCKS, give_of(values), share=0.01).tolist() == [3.0, 7.0, 0.0]  # never less than one
    assert top_mean(BLOCKS, give_of(values), share=1.0).tolist() == [1.5, 3.5, 0.0]


def test_what_is_not_known_is_left_out():
    scores = top_mean(BLOCKS, give_of({11: 4.0, 25: 2.0, 26: 6.0}), share=1.0)
    assert scores[:2].tolist() == [4.0, 4.0]
    assert np.isnan(scores[2])
    assert highest(BLOCKS, give_of({25: 2.0, 26: 6.0})).tolist()[1] == 6.0


def test_evidence_is_asked_once_for_all_blocks():
    asked = []

    def give(part: Range) -> np.ndarray:
        asked.append(part)
        return np.zeros(part.cells)

    top_mean(BLOCKS[::-1], give, share=0.5)
    assert asked == [Range(10, 31)]
    assert top_mean([], give, share=0.5).shape == (0,)


def test_gaps_get_the_middle_of_the_rest():
    assert without_gaps(np.array([1.0, NAN, 3.0, 9.0])).tolist() == [1.0, 3.0, 3.0, 9.0]
    assert without_gaps(np.array([NAN, NAN])).tolist() == [0.0, 0.0]
    assert without_gaps(np.empty(0)).tolist() == []


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([5.0, 1.0, 3.0], [1.0, 0.0, 0.5]),
        ([2.0, 2.0, 7.0], [0.25, 0.25, 1.0]),
        ([NAN, 4.0, NAN, 2.0], [NAN, 1.0, NAN, 0.0]),
        ([4.0], [0.0]),
        ([NAN], [NAN]),
        ([], []),
    ],
)
def test_ranks(scores, expected):
    assert np.array_equal(ranks(np.array(scores)), np.array(expected), equal_nan=True)


@given(st.lists(st.floats(-1e6, 1e6) | st.just(NAN), max_size=30))
def test_ranks_keep_the_order_and_lie_between_0_and_1(scores):
    values = np.array(scores, dtype=np.float64)
    placed = ranks(values)
    known = ~np.isnan(values)
    assert np.array_equal(np.isnan(placed), ~known)
    assert ((placed[known] >= 0.0) & (placed[known] <= 1.0)).all()
    for a in np.flatnonzero(known):
        for b in np.flatnonzero(known):
            assert (values[a] < values[b]) == (placed[a] < placed[b])
