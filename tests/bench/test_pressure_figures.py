"""Medians, ratios and verdicts of the pressure benchmark."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psikv_bench.pressure.figures import RATIOS, figures, whole_repeats, work_beside
from scene_results import runs, scene_result

VARIANTS = ("fixed", "reference", "psi")
FIXED = {"tokens_per_s": 4.0, "p99_s": 0.5}
REFERENCE = {"tokens_per_s": 5.0, "p99_s": 0.4, "missing_cells": 3000, "trims": 1}
PSI = {"tokens_per_s": 16.0, "p99_s": 0.1, "bytes_returned": 60_000_000, "trims": 2, "restored": True}


def found(played, *, variants=VARIANTS, calm=False, judged=True):
    return {(entry.case, entry.name): entry for entry in figures(played, variants, calm=calm, judged=judged)}


def test_ratios_are_of_the_runs_of_one_repeat():
    played = runs(
        {"fixed": FIXED, "reference": REFERENCE, "psi": PSI},
        {
            "psi": {**PSI, "tokens_per_s": 6.0},
            "reference": REFERENCE,
            "fixed": {**FIXED, "tokens_per_s": 2.0},
        },
    )
    shown = found(played)
    assert shown[RATIOS, "psi / fixed, tokens/s"].values == [4.0, 3.0]
    assert shown[RATIOS, "psi / reference, tokens/s"].values == pytest.approx([3.2, 1.2])
    assert shown[RATIOS, "reference / fixed, tokens/s"].values == pytest.approx([1.25, 2.5])
    assert shown[RATIOS, "psi / fixed, p99 of a token"].values == pytest.approx([0.2, 0.2])
    assert shown["psi", "returned"].median == 60.0
    assert shown["reference", "missing at the end"].max == 3000


def test_what_is_asked_is_met_or_missed_by_the_median():
    good = found(runs({"fixed": FIXED, "reference": REFERENCE, "psi": PSI}))
    assert good[RATIOS, "psi / fixed, tokens/s"].passed
    assert good[RATIOS, "psi / reference, p99 of a token"].passed
    assert good[RATIOS, "psi / fixed, neighbour's work"].passed
    assert good[RATIOS, "psi / fixed, peak resident"].passed is False
    poor = found(runs({"fixed": FIXED, "reference": REFERENCE, "psi": FIXED}))
    assert poor[RATIOS, "psi / fixed, tokens/s"].passed is False
    assert poor[RATIOS, "psi / reference, p99 of a token"].passed is False


@pytest.mark.parametrize("fault", [{"killed": True}, {"missing_cells": 1}])
def test_one_governed_run_that_was_killed_or_lost_a_token_is_a_miss(fault):
    played = runs({"psi": PSI}, {"psi": {**PSI, **fault}}, {"psi": PSI})
    shown = found(played, variants=("psi",))
    assert [entry.passed for entry in shown.values()].count(False) == 1


def test_a_reference_that_returned_memory_is_said_to_have_done_so():
    name = "reference", "returned"
    assert found(runs({"reference": REFERENCE}), variants=("reference",))[name].passed
    back = {**REFERENCE, "bytes_returned": 5_000_000}
    assert found(runs({"reference": back}), variants=("reference",))[name].passed is False


def test_a_run_that_decoded_nothing_counts_as_less_than_one_token():
    stood = {"tokens_per_s": 0.0, "p99_s": None, "seconds": 20.0, "killed": True, "tokens": 0}
    shown = found(runs({"fixed": stood, "psi": PSI}), variants=("fixed", "psi"))
    assert shown[RATIOS, "psi / fixed, tokens/s"].values == [pytest.approx(320.0)]
    assert shown[RATIOS, "psi / fixed, p99 of a token"].values == [pytest.approx(0.005)]


def test_without_a_neighbour_only_the_speed_is_asked():
    calm = {"neighbour_bytes_per_s": None, "neighbour_work": [], "restored": None}
    played = runs({"fixed": {**calm, "tokens_per_s": 30.0}, "psi": {**calm, "tokens_per_s": 29.0}})
    shown = found(played, variants=("fixed", "psi"), calm=True)
    asked = {name: entry.passed for name, entry in shown.items() if entry.asked}
    assert asked == {(RATIOS, "psi / fixed, tokens/s"): False}
    assert (RATIOS, "psi / fixed, neighbour's work") not in shown


def test_what_was_not_isolated_is_not_judged():
    played = runs({"fixed": FIXED, "reference": REFERENCE, "psi": PSI})
    assert not any(entry.asked for entry in found(played, judged=False).values())


def test_a_repeat_that_was_cut_short_counts_in_no_ratio():
    played = runs({"fixed": FIXED, "psi": PSI}, {"fixed": FIXED})
    assert len(whole_repeats(played, ("fixed", "psi"))) == 1
    shown = found(played, variants=("fixed", "psi"))
    assert len(shown[RATIOS, "psi / fixed, tokens/s"].values) == 1
    assert len(shown["fixed", "tokens/s"].values) == 2


def test_nothing_played_gives_no_figures():
    assert found([]) == {}


def test_neighbours_are_compared_over_the_time_in_which_both_runs_decoded():
    slow = scene_result("fixed", seconds=10.0, neighbour_work=[(0.0, 0), (2.0, 100), (10.0, 10_000)])
    fast = scene_result("psi", seconds=2.0, neighbour_work=[(0.0, 0), (1.0, 100), (3.0, 2100)])
    assert work_beside(slow, fast) == 100
    assert work_beside(fast, slow) == 1100
    assert work_beside(fast, fast) == 1100


@given(st.floats(0.1, 100), st.floats(0.1, 100))
def test_a_ratio_and_its_inverse_are_inverse(ours, theirs):
    one = found(
        runs({"fixed": {"tokens_per_s": ours}, "reference": {"tokens_per_s": theirs}}),
        variants=("fixed", "reference"),
    )
    other = found(
        runs({"fixed": {"tokens_per_s": theirs}, "reference": {"tokens_per_s": ours}}),
        variants=("fixed", "reference"),
    )
    name = RATIOS, "reference / fixed, tokens/s"
    assert one[name].median * other[name].median == pytest.approx(1.0)
