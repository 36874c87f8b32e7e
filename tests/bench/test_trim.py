"""Holes, and a small real run of the trim benchmark."""

from __future__ import annotations

import itertools
import mmap

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from psi_kv_governor.bench import trim
from psi_kv_governor.bench.record import Options
from psi_kv_governor.bench.twins import Twins, anonymous_bytes, differing

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.policy.base import Range


@given(st.integers(1, 20_000), st.floats(0.01, 1.0), st.integers(1, 16))
def test_holes_are_apart_of_one_size_and_leave_sinks_and_window(tokens, share, count):
    try:
        holes = trim.holes_in(tokens, share, count)
    except PsiKvError:
        assume(False)
    assert len(holes) == count
    assert len({hole.cells for hole in holes}) == 1
    assert sum(hole.cells for hole in holes) >= tokens * share
    assert holes[0].start == trim.SINK_CELLS
    assert holes[-1].stop <= tokens - trim.WINDOW_CELLS
    assert all(left.stop < right.start for left, right in itertools.pairwise(holes))


def test_known_holes():
    assert trim.holes_in(1024, 0.5, 1) == [Range(64, 576)]
    assert trim.holes_in(1024, 0.5, 2) == [Range(64, 320), Range(416, 672)]


@pytest.mark.parametrize(("tokens", "share", "count"), [(300, 0.5, 1), (1024, 0.7, 1), (4096, 0.7, 2000)])
def test_holes_that_do_not_fit_are_refused(tokens, share, count):
    with pytest.raises(PsiKvError, match="no room"):
        trim.holes_in(tokens, share, count)


@pytest.mark.parametrize("plan", [trim.FULL, trim.QUICK])
def test_each_plan_has_what_is_to_be_shown(plan):
    assert {case.cache for case in plan.cases} == {"f16", "q8_0"}
    assert any(case.tokens == 4096 and case.holes == 1 for case in plan.cases)
    assert any(case.holes > 1 for case in plan.cases)
    for case in plan.cases:
        trim.holes_in(case.tokens, plan.share, case.holes)


def test_logits_differ_by_their_bits():
    left = np.array([0.0, 1.0, np.nan], dtype=np.float32)
    assert differing(left, left.copy()) == 0
    assert differing(left, np.array([-0.0, 1.0, np.nan], dtype=np.float32)) == 1
    assert differing(left, np.nextafter(left, np.float32(2))) == 2


def test_anonymous_memory_follows_what_is_taken():
    before = anonymous_bytes()
    # Not an array: that could come from memory which was freed and not returned.
    with mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as taken:
        taken.write(b"\1" * len(taken))
        assert anonymous_bytes() - before >= len(taken) - (1 << 20)


TOKENS = 600
SMALL = trim.Plan(
    cases=(trim.Case("f16", TOKENS, 1), trim.Case("f16", TOKENS, 2)),
    share=0.45,
    repeats=1,
    recompute_cells=32,
    recompute_repeats=1,
)


def least_returned(case: trim.Case) -> float:
    """A hole may keep a page at each edge, in each of the 60 tensors of 384 bytes a row."""
    return 1 - 2 * case.holes * 4096 / (SMALL.share * case.tokens * 384)


@pytest.mark.llama
def test_a_small_run_returns_the_rows_and_changes_no_bit(demo_model, tmp_path, monkeypatch):
    monkeypatch.setenv("PSI_KV_STORE_DIR", str(tmp_path))
    told: list[str] = []
    found = list(trim.measure(Options(model=demo_model), SMALL, 1, told.append))
    for case in SMALL.cases:
        of = {entry.name: entry for entry in found if entry.case == str(case)}
        assert [name for name in of if name.startswith("logits")], case
        assert all(entry.passed for name, entry in of.items() if name.startswith("logits"))
        for name in ("returned by a release", "returned by a trim with spilling"):
            assert least_returned(case) <= of[name].median <= 1.01
        assert of["release"].median > 0.5
    gains = [entry for entry in found if entry.name == "recompute over restore"]
    assert len(gains) == 1
    assert gains[0].median > 1
    assert told


@pytest.mark.llama
def test_holes_change_the_logits_that_are_compared(demo_model):
    """Else the comparison of logits could not fail."""
    with Twins(demo_model, "q8_0", 160, threads=1, store=None, say=lambda doing: None) as twins:
        assert differing(twins.whole, twins.next_logits(twins.governed)) == 0
        twins.remove([Range(32, 96)])
        assert differing(twins.whole, twins.next_logits(twins.governed)) > 0
        twins.refill(twins.governed)
        assert differing(twins.whole, twins.next_logits(twins.governed)) == 0
