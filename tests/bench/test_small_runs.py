"""Small real runs of the scenes without a neighbour, and what they are made of."""

from __future__ import annotations

import itertools
import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm import CALM
from gguf_models import Shape, write_model
from psi_kv_governor.control.decision import Mode
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.events import ModeChanged, Trimmed
from psi_kv_governor.policy import Range
from psikv_bench.far import FOUND
from psikv_bench.host import Host
from psikv_bench.messages import Done, Setup
from psikv_bench.model import differing
from psikv_bench.record import Recorder, say_nothing
from psikv_bench.scenes import capacity, overhead, recall, scale, trim
from psikv_bench.trials.sizing import until_opened
from psikv_bench.wide_model import CELL_BYTES


def measured(scene, options, **given):
    report = scene.SCENE.run(Recorder("any", options, **given))
    return {(found.case, found.name): found for found in report.figures}


class TestTrim:
    @given(st.integers(400, 20_000), st.floats(0.01, 1.0), st.integers(1, 16))
    def test_ranges_are_apart_of_one_size_and_leave_sinks_and_window(self, tokens, part, count):
        # Of what fits: were two of three examples thrown away, Hypothesis would now and then refuse them all.
        share = part * (1 - (trim.SINK_CELLS + trim.WINDOW_CELLS + 2 * count) / tokens)
        ranges = trim.ranges_in(tokens, share, count)
        assert len(ranges) == count
        assert len({part.cells for part in ranges}) == 1
        assert sum(part.cells for part in ranges) >= tokens * share
        assert ranges[0].start == trim.SINK_CELLS
        assert ranges[-1].stop <= tokens - trim.WINDOW_CELLS
        assert all(left.stop < right.start for left, right in itertools.pairwise(ranges))

    def test_known_ranges(self):
        assert trim.ranges_in(1024, 0.5, 1) == [Range(64, 576)]
        assert trim.ranges_in(1024, 0.5, 2) == [Range(64, 320), Range(416, 672)]

    @pytest.mark.parametrize(("tokens", "share", "count"), [(300, 0.5, 1), (1024, 0.7, 1), (4096, 0.7, 2000)])
    def test_ranges_that_do_not_fit_are_refused(self, tokens, share, count):
        with pytest.raises(PsiKvError, match="too few"):
            trim.ranges_in(tokens, share, count)

    @pytest.mark.parametrize("cases", [trim._FULL, trim._QUICK])
    def test_each_form_has_what_is_to_be_shown(self, cases):
        assert {case.cache for case in cases} == {"f16", "q8_0"}
        assert any(case.tokens == 4096 and case.ranges == 1 for case in cases)
        assert any(case.ranges > 1 for case in cases)
        for case in cases:
            trim.ranges_in(case.tokens, trim.SHARE, case.ranges)

    def test_logits_differ_by_their_bits(self):
        left = np.array([0.0, 1.0, np.nan], dtype=np.float32)
        assert differing(left, left.copy()) == 0
        assert differing(left, np.array([-0.0, 1.0, np.nan], dtype=np.float32)) == 1
        assert differing(left, np.nextafter(left, np.float32(2))) == 2

    @pytest.mark.llama
    def test_a_small_run_returns_the_rows_and_changes_no_bit(self, shallow_model, monkeypatch):
        monkeypatch.setattr(trim, "SHARE", 0.45)
        cases = (trim.Case("f16", 600, 1), trim.Case("f16", 600, 2))
        # The middle one of five: what is returned is measured by the memory of this whole process, which may
        # move by more than the edges allow for, and what comes back by the clock.
        options = trim.TrimOptions(model=str(shallow_model), repeats=5, again=5, again_cells=32, threads=1)
        said: list[str] = []
        found = list(
            trim.measure(Recorder("trim", options, say=lambda doing, **_: said.append(doing)), cases)
        )
        for case in cases:
            of = {entry.name: entry for entry in found if entry.case == str(case)}
            exact = [entry for name, entry in of.items() if "unlike" in name or "changed" in name]
            assert len(exact) == 3
            assert all(entry.passed for entry in exact)
            # A range may keep a page at each edge, in each of the tensors of 384 bytes a row, or take one
            # that it shares with free rows.
            least = 1 - 2 * case.ranges * 4096 / (0.45 * case.tokens * 384)
            for name in ("returned by a release", "returned by a trim"):
                assert least <= of[name].median <= 2 - least
        (gain,) = [entry for entry in found if entry.name == "decoding again over restoring"]
        assert gain.median > 1
        assert said

    @pytest.mark.llama
    def test_a_range_that_is_gone_changes_the_logits_that_are_compared(self, shallow_model):
        """Else the comparison of logits could not fail."""
        options = trim.TrimOptions(model=str(shallow_model))
        setup = Setup(variant="psi", model=str(shallow_model), auto=False, context_tokens=160, cache="q8_0")
        with trim._Filled(setup, Recorder("trim", options)) as filled:
            whole = filled.next_logits()
            filled.remove([Range(32, 96)])
            assert differing(whole, filled.next_logits()) > 0
            filled.refill()
            assert differing(whole, filled.next_logits()) == 0
            filled.mask([Range(64, 128)])
            assert filled.missing_share() == pytest.approx(64 / 160)
            filled.unmask()
            assert differing(whole, filled.next_logits()) == 0


@pytest.fixture
def calm(monkeypatch):
    """What others of this machine bring about is no pressure: it would rightly end a measurement."""
    for name, value in CALM.items():
        monkeypatch.setenv(name, value)


class TestOverhead:
    def test_every_second_pair_is_the_other_way_round_and_each_result_in_its_place(self):
        order: list[str] = []

        def turn(name: str, seconds: float) -> Done:
            order.append(name)
            return Done(seconds=seconds, cpu_s=seconds)

        pairs = list(overhead.in_turns(lambda: turn("plain", 1.0), lambda: turn("governed", 2.0), 4))
        assert order == ["plain", "governed", "governed", "plain"] * 2
        assert [(plain.seconds, governed.seconds) for plain, governed in pairs] == [(1.0, 2.0)] * 4

    @pytest.mark.parametrize(
        "event",
        [
            ModeChanged(time_s=1.0, old=Mode.CALM, new=Mode.TRIMMING, reason="stall 40 %"),
            Trimmed(time_s=1.0, cells=64, masked=64, bytes_returned=1, seconds=0.1, reason="stall 40 %"),
        ],
    )
    def test_a_machine_under_pressure_is_not_measured(self, event):
        watch = overhead.CalmWatch()
        watch.hear(event)
        with pytest.raises(PsiKvError, match=r"not calm .stall 40 %"):
            watch.check()

    def test_a_machine_that_is_only_watched_is_calm_enough(self):
        watch = overhead.CalmWatch()
        watch.hear(ModeChanged(time_s=1.0, old=Mode.CALM, new=Mode.WATCHING, reason="stall 4 %"))
        watch.check()

    @pytest.mark.llama
    @pytest.mark.usefixtures("calm")
    def test_a_small_run_compares_the_two_in_processes_of_their_own(self, shallow_model):
        options = overhead.OverheadOptions(
            model=str(shallow_model), threads=1, openings=1, repeats=2, tokens=4, idle_s=0.05
        )
        of = measured(overhead, options)
        ratio = of["1 thread", "governed over plain speed"]
        assert len(ratio.values) == 2
        assert ratio.asked == overhead.SPEED
        assert ratio.median > 0  # 4 tokens on a busy machine say no more
        assert of["1 thread", "plain"].median > 0
        assert len(of["", "processor time while idle and calm"].values) == 1
        assert of["", "memory beside the engine"].passed

    @pytest.mark.llama
    @pytest.mark.usefixtures("calm")
    def test_a_prompt_is_decoded_anew_in_each_turn_where_that_is_measured(self, shallow_model):
        options = overhead.OverheadOptions(
            model=str(shallow_model), threads=1, openings=1, repeats=1, prefill=96, idle_s=0.05,
            variant="psi-file",
        )  # fmt: skip
        of = measured(overhead, options)
        assert of["1 thread", "governed over plain speed"].median > 0
        # Each page at most once a turn, and not at all while it is still dirty from the turn before.
        assert of["", "dirtied on a disk a token"].median < 1.25 * 4.608


@pytest.mark.llama
def test_a_governed_context_is_demand_paged_and_a_plain_one_is_not(shallow_model):
    resident = {}
    for variant in ("fixed", "psi"):
        with Host(Setup(variant=variant, model=str(shallow_model), context_cells=40_960)) as host:
            resident[variant] = until_opened(host, say_nothing).memory.resident_bytes
    assert resident["fixed"] - resident["psi"] > 0.7 * 40_960 * 4_608


@pytest.mark.llama
def test_what_recall_costs_is_taken_on_a_context_of_copies(tmp_path):
    model = write_model(tmp_path / "deep.gguf", Shape("llama", n_layer=16))
    options = recall.RecallOptions(model=str(model), live=1024, parked=1024, tokens=8, rounds=1, threads=1)
    found = {name: one for (_, name), one in measured(recall, options).items()}
    scoring = found["sampling and scoring, processor time over decoding"]
    assert scoring.asked == recall.SCORING
    assert math.isfinite(scoring.median)
    assert found["live cells at the end"].median == 1024 + 1 + 2 * 3 * 8
    assert 0 < found["summary over what is parked"].median <= 0.02


@pytest.mark.llama
def test_a_context_is_read_within_a_budget_of_live_cells_and_asked(tmp_path):
    model = write_model(tmp_path / "deep.gguf", Shape("llama", n_layer=16, n_head=8, n_head_kv=8))
    options = capacity.CapacityOptions(model=str(model), needles=2, live=384, times=3, threads=1)
    found = {name: one for (_, name), one in measured(capacity, options).items()}
    assert found["context over live cells"].median == 3
    # Weights that mean nothing find nothing; what is over the budget is gone from memory all the same.
    assert found["resident cache over what the live cells take"].median < 1.5
    assert found["of these with recall"].asked == FOUND
    assert found["found with the whole context"].median <= found["facts hidden"].median == 2
    assert found["decoding within the budget, with recall"].median > 0


@pytest.mark.slow
@pytest.mark.cgroup
@pytest.mark.llama
def test_it_can_be_read_in_a_cgroup_of_its_own(tmp_path):
    model = write_model(tmp_path / "deep.gguf", Shape("llama", n_layer=16, n_head=8, n_head_kv=8))
    options = capacity.CapacityOptions(
        model=str(model), needles=2, live=384, times=3, threads=1, limits=(160,)
    )
    found = {name: one for (_, name), one in measured(capacity, options).items()}
    assert found["limit of the cgroup"].median == pytest.approx(160 * 1.048576)
    assert 0 < found["most that was charged to it"].median <= 160 * 1.048576
    with pytest.raises(PsiKvError, match="one limit is played"):
        measured(capacity, msgspec.structs.replace(options, limits=(160, 200)))


@pytest.mark.parametrize(("live", "why"), [(320, "320 cells are protected"), (2048, "beyond this model's")])
@pytest.mark.llama
def test_a_budget_that_leaves_nothing_or_a_length_it_was_not_trained_for_is_refused(tmp_path, live, why):
    model = write_model(tmp_path / "deep.gguf", Shape("llama", n_layer=16))
    options = capacity.CapacityOptions(model=str(model), needles=1, live=live, times=2, threads=1)
    with pytest.raises(PsiKvError, match=why):
        measured(capacity, options)


@pytest.mark.llama
@pytest.mark.parametrize("backing", ["file", "memory"])
def test_a_small_cache_of_a_large_model_s_shape_goes_whole_and_comes_back(shallow_model, backing):
    options = scale.ScaleOptions(model=str(shallow_model), sizes=(2048,), backings=(backing,))
    found = {name: one.median for (_, name), one in measured(scale, options).items()}
    whole = 2048 * CELL_BYTES / 1e9
    for name in ("trim", "trim of clean ranges", "restore"):
        assert found[f"{name}: bytes"] == pytest.approx(whole, rel=0.02), name
    assert found["release: bytes"] == pytest.approx(whole / 2, rel=0.02)
    assert found["mappings of the cache"] < 200
    assert found["resident when opened"] < 4
