"""Divergence, agreement and likelihood against references that are written out; intervals by their laws."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from psikv_bench.fidelity.metrics import Reference, agreeing, log_softmax
from psikv_bench.intervals import mean_of

LOGIT = st.floats(-30, 30, width=32)
SHAPE = (3, 5)


def two_sets() -> st.SearchStrategy[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    one = arrays(np.float32, SHAPE, elements=LOGIT)
    return st.tuples(one, one)


def probabilities(row: npt.NDArray[np.float32]) -> list[float]:
    """The softmax as it is written in a book."""
    terms = [math.exp(float(value)) for value in row]
    return [term / math.fsum(terms) for term in terms]


@given(two_sets())
def test_divergence_is_that_of_the_definition(logits):
    full, trimmed = logits
    compared = Reference(full, [0, 1, 2]).compare(trimmed)
    for i in range(SHAPE[0]):
        p, q = probabilities(full[i]), probabilities(trimmed[i])
        by_hand = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert compared.kl[i] == pytest.approx(by_hand, abs=1e-9)


@given(two_sets())
def test_divergence_is_never_negative_and_zero_only_from_itself(logits):
    full, trimmed = logits
    reference = Reference(full, [0, 1, 2])
    assert (reference.compare(trimmed).kl >= 0.0).all()
    assert reference.compare(full).kl == pytest.approx(np.zeros(3), abs=1e-12)
    assert reference.compare(full).top1.tolist() == [1.0, 1.0, 1.0]


@given(two_sets(), st.lists(st.integers(0, 4), min_size=3, max_size=3))
def test_likelihood_is_of_the_token_that_comes_next(logits, targets):
    full, trimmed = logits
    compared = Reference(full, targets).compare(trimmed)
    for i, target in enumerate(targets):
        assert compared.nll[i] == pytest.approx(-math.log(probabilities(trimmed[i])[target]), abs=1e-9)


@given(two_sets(), st.floats(-100, 100, width=32))
def test_adding_a_constant_to_the_logits_changes_nothing(logits, constant):
    full, trimmed = logits
    reference = Reference(full, [0, 1, 2])
    shifted = (trimmed.astype(np.float64) + constant).astype(np.float64)
    assert log_softmax(shifted) == pytest.approx(log_softmax(trimmed), abs=1e-6)
    assert reference.compare(shifted).kl == pytest.approx(reference.compare(trimmed).kl, abs=1e-5)


def test_large_logits_do_not_overflow():
    logits = np.array([[1e4, 0.0, -1e4]], dtype=np.float32)
    assert np.isfinite(log_softmax(logits)).all()


def test_agreement_is_about_the_most_probable_token():
    full = np.array([[0, 1, 2], [5, 1, 2], [0, 9, 2]], dtype=np.float32)
    trimmed = np.array([[0, 1, 9], [1, 5, 2], [0, 1, 0]], dtype=np.float32)
    assert Reference(full, [0, 0, 0]).compare(trimmed).top1.tolist() == [1.0, 0.0, 1.0]


def test_tokens_agree_up_to_the_first_other_one():
    assert agreeing([1, 2, 3], [1, 2, 3]) == 3
    assert agreeing([1, 2, 3], [1, 9, 3]) == 1
    assert agreeing([1, 2], [1, 2, 3]) == 2
    assert agreeing([], []) == 0


# -- intervals ---------------------------------------------------------------------------------------------

SERIES = st.lists(arrays(np.float64, st.integers(1, 40), elements=st.floats(0, 10)), min_size=1, max_size=4)


@settings(max_examples=20)
@given(SERIES)
def test_the_mean_is_that_of_all_values_and_lies_in_its_interval(series):
    found = mean_of(series, seed=1)
    assert found.mean == pytest.approx(float(np.concatenate(series).mean()))
    assert min(map(np.min, series)) - 1e-9 <= found.low <= found.mean <= found.high
    assert found.high <= max(map(np.max, series)) + 1e-9


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(30):
        found = mean_of([generator.normal(1.0, 1.0, 160) for _ in range(8)], seed)
        covered += found.low <= 1.0 <= found.high
    assert 25 <= covered <= 30


def test_neighbours_that_err_together_widen_the_interval():
    values = np.random.default_rng(0).normal(size=320)
    alike = np.repeat(values[::16], 16)

    def width(series: npt.NDArray[np.float64]) -> float:
        found = mean_of([series])
        return found.high - found.low

    assert width(alike) > 2 * width(np.random.default_rng(1).permutation(alike))


def test_the_same_seed_gives_the_same_interval():
    series = [np.arange(50.0), np.arange(30.0)]
    assert mean_of(series, 3) == mean_of(series, 3)
    assert mean_of(series, 3) != mean_of(series, 4)


def test_no_values_have_no_mean():
    for empty in ([], [np.empty(0)]):
        with pytest.raises(ValueError, match="no values"):
            mean_of(empty)
