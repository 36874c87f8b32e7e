"""What is made of fabricated outcomes: tables, figures, plots, files, and going on with a journal."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trials_help import MIB, onset, probe, trial

from psi_kv_governor.errors import BadInputError, PsiKvError
from psikv_bench import capacity_report, oom_report, reaction_report
from psikv_bench.journal import remaining
from psikv_bench.messages import Token, Turned
from psikv_bench.oom_report import rate_words
from psikv_bench.options import chosen
from psikv_bench.record import Recorder, flat
from psikv_bench.scenes import capacity
from psikv_bench.scenes.capacity import CapacityOptions
from psikv_bench.scenes.latency import LatencyOptions
from psikv_bench.scenes.oom import OomOptions, schedule
from psikv_bench.trials.series import near


class TestOom:
    def test_each_kind_of_end_is_said_apart(self):
        trials = [
            trial(),
            trial(model_killed=True, whole=None),
            trial(neighbour_killed=True),
            trial(model_killed=True, neighbour_killed=True, whole=None),
            trial(stuck=True, whole=False),
        ]
        found = oom_report.cell("psi", 100.0, trials)
        assert (
            found.killed.trials,
            found.killed.hits,
            found.model_killed,
            found.neighbour_killed,
            found.stuck,
        ) == (
            5,
            3,
            2,
            2,
            1,
        )
        assert (found.survived, found.whole) == (3, 2)
        assert found.killed.low < 0.6 < found.killed.high
        assert (found.p50_s, found.p99_s) == (0.03, 0.5)

    def test_one_kill_of_a_governed_run_up_to_the_asked_ramp_misses_the_target(self):
        good = [trial(rate=200.0), trial(rate=0.0, model_killed=True), trial("fixed", model_killed=True)]
        assert [one.passed for one in oom_report.figures(good)] == [True, True, None]
        bad = [*good, trial(rate=200.0, neighbour_killed=True), trial("fixed"), trial("fixed")]
        assert [one.passed for one in oom_report.figures(bad)] == [False, False, None]

    def test_the_table_of_the_field_counts_per_thousand(self):
        trials = [trial("fixed", model_killed=True)] * 3 + [trial("fixed")] + [trial()] * 4
        field = oom_report.tables(trials)[-1]
        assert [row[0] for row in field.rows] == ["fixed", "psi"]
        assert field.rows[0][3].startswith("750 (")
        assert field.rows[1][3].startswith("0 (0 to ")

    def test_a_kill_is_explained_by_the_governors_last_turn(self):
        turn = Turned(
            time_s=1.0,
            some=0.5,
            headroom_bytes=0,
            live_bytes=77 << 20,
            action="none",
            reason="the floor holds",
        )
        said = list(oom_report.notes([trial(model_killed=True, trail=[turn], number=9)]))
        assert any("run 9" in note and "the floor holds" in note and "77 MiB live" in note for note in said)

    @given(st.integers(1, 200), st.integers(0, 5))
    def test_both_variants_go_through_the_same_rates_in_turns(self, runs, seed):
        order = list(schedule(OomOptions(runs=runs, seed=seed)))
        assert len(order) == runs
        counts = {variant: [rate for name, rate in order if name == variant] for variant in ("fixed", "psi")}
        assert abs(len(counts["fixed"]) - len(counts["psi"])) <= 1
        if runs % 2 == 0:
            assert sorted(counts["fixed"]) == sorted(counts["psi"])
        rates = OomOptions().rates
        most = max(counts["psi"].count(rate) for rate in rates)
        assert most - min(counts["psi"].count(rate) for rate in rates) <= 1

    @given(st.integers(1, 60), st.integers(0, 60))
    def test_a_longer_run_goes_on_where_a_shorter_one_ended(self, first, more):
        short, long = (list(schedule(OomOptions(runs=runs))) for runs in (first, first + more))
        ahead = remaining(long, short)
        assert Counter(short) + Counter(ahead) >= Counter(long)
        assert remaining(short, short) == []
        assert len(ahead) <= more + 16  # the shorter one's last round may have had other rates


class TestCapacity:
    def test_the_gain_is_that_of_the_longest_that_survived(self):
        probes = [
            probe("fixed", 1024),
            probe("fixed", 2048, "slow"),
            probe("psi", 2048),
            probe("psi", 4096, live_cells=1024, masked_cells=3072),
            probe("psi", 8192, "killed"),
        ]
        gain, live, speed = capacity_report.figures(probes)
        assert (gain.median, gain.passed) == (4.0, True)
        assert live.median == 0.25
        assert speed.median == 1.0
        best = capacity_report.best_table(probes)
        assert [row[2] for row in best.rows] == ["1,024", "4,096"]
        assert best.rows[1][3:5] == ["25%", "3,072"]

    @pytest.mark.parametrize(
        ("seconds", "silent_s", "slow"),
        [
            ([(32, 3.2)], 3.1, False),
            ([(32, 3.3)], 0.0, True),
            ([(8, 0.8)], 3.1, False),  # a last chunk is a short one, the next may be whole
            ([(32, 3.0)], 3.3, True),
            ([(32, 3.0), (1, 0.7)], 0.1, False),  # one token, and there are seven more to come
            ([(32, 3.0), (1, 0.7), (1, 0.2)], 0.1, True),
            ([(32, 3.0), (1, 0.1)], 0.9, True),
        ],
    )
    def test_slow_is_a_whole_chunk_or_all_of_the_single_tokens(self, seconds, silent_s, slow):
        decoded = [Token(time_s=0.0, seconds=one, tokens=tokens) for tokens, one in seconds]
        assert capacity_report.too_slow(decoded, silent_s, 8, 32, 10.0) is slow

    def test_where_nothing_survives_nothing_is_claimed(self):
        probes = [probe("fixed", 256, "killed"), probe("psi", 256)]
        assert list(capacity_report.figures(probes)) == []
        assert capacity_report.best_table(probes).rows[0][2] == "none"

    def test_what_was_left_out_comes_from_the_model_in_peace(self):
        peace = probe("fixed", 256, tokens_per_s=100.0, limit_bytes=0, peak_bytes=150 * MIB)
        found = capacity._completed(CapacityOptions(), peace, quick=False)
        assert found.least_tokens_s == pytest.approx(10.0)
        assert list(found.limits) == [176, 200, 248]
        assert capacity._completed(CapacityOptions(), peace, quick=True).limits == (176,)
        given = CapacityOptions(limits=(99,), least_tokens_s=3.0)
        assert capacity._completed(given, peace, quick=True) == given
        blind = probe("fixed", 256, limit_bytes=0, peak_bytes=0)
        with pytest.raises(PsiKvError, match="--limits"):
            capacity._completed(CapacityOptions(), blind, quick=False)


class TestLatency:
    def test_reactions_count_from_the_sign_and_those_before_it_as_0(self):
        onsets = [
            onset(),
            onset(returned_s=0.1),
            onset(signal="", signal_s=None, returned_s=0.2),
            onset(returned_s=None),
        ]
        assert [one.reaction_s for one in onsets] == [pytest.approx(0.1), 0.0, 0.0, None]
        assert [one.before_sign for one in onsets] == [False, True, True, False]
        p50, p99, *_ = reaction_report.figures(onsets)
        assert (p50.passed, p99.passed) == (True, True)
        slow = list(reaction_report.figures([onset(returned_s=0.3 + 0.5)]))
        assert [one.passed for one in slow[:2]] == [False, False]

    def test_pollers_are_judged_on_governed_and_on_ungoverned_onsets(self):
        onsets = [
            onset(),
            onset(variant="fixed", returned_s=None, polled_s=2.3),
            onset(variant="fixed", returned_s=None, polled_s=5.3),
        ]
        rows = {row[1]: row for row in reaction_report.tables(onsets)[0].rows}
        assert rows["poll avg10 every 1 s, governed"][5] == "1"
        ungoverned = rows["poll avg10 every 1 s, ungoverned"]
        assert ungoverned[5] == "0"
        assert ungoverned[6:9] == ["3500", "5000", "5000"]
        assert rows["governor, bytes back"][2] == "1"

    def test_the_table_and_the_verdict_tell_the_same_middle_of_an_even_number_of_onsets(self):
        onsets = [onset(returned_s=0.4), onset(returned_s=0.5)]
        p50 = next(reaction_report.figures(onsets))
        assert reaction_report.tables(onsets)[0].rows[0][6] == f"{p50.median:.0f}" == "150"

    def test_tokens_are_sorted_by_what_they_overlap_with(self):
        def token(begin, end, tokens=1):
            return Token(time_s=end, seconds=end - begin, tokens=tokens)

        found = near(
            [
                token(0.0, 0.5),
                token(1.5, 1.9),
                token(1.9, 2.15),
                token(2.15, 2.45),
                token(2.45, 2.6),
                token(3.0, 3.3),
                token(3.3, 3.9),
                token(3.9, 4.4),
                token(1.2, 1.4, tokens=512),
            ],
            trims=[(2.0, 2.1)],
            restores=[(3.5, 3.6)],
            pressed=(1.0, 3.0),
        )
        assert found.calm == pytest.approx([0.5])
        assert found.pressed == pytest.approx([0.4, 0.15])
        assert found.trim == pytest.approx([0.25, 0.3])
        assert found.restore == pytest.approx([0.6])


def test_everything_is_kept_in_the_folder(tmp_path):
    trials = [trial("fixed", rate=rate, model_killed=True, whole=None) for rate in (10.0, 0.0)]
    trials += [trial(rate=rate) for rate in (10.0, 0.0)]
    folder = tmp_path / "out"
    model = tmp_path / "any.gguf"
    model.write_bytes(b"GGUF")
    recorder = Recorder("oom", OomOptions(model=str(model)), folder=folder)
    report = recorder.report(
        list(oom_report.figures(trials)), [1], interrupted=True, tables=oom_report.tables(trials),
        notes=list(oom_report.notes(trials)), rows=oom_report.cells(trials),
    )  # fmt: skip
    recorder.save(report, flat(trials), lambda where: oom_report.plot(where, trials))
    result = json.loads((folder / "result.json").read_text())
    assert result["interrupted"] is True
    assert [row["killed"]["hits"] for row in result["rows"]] == [1, 1, 0, 0]
    assert result["header"]["versions"]["python"]
    summary = (folder / "summary.md").read_text()
    for word in (
        "Interrupted",
        "as fast as it can",
        "pass: runs with a kill",
        "stuck: neither died",
        "Linux",
    ):
        assert word in summary
    lines = (folder / "oom.csv").read_text().splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("number,variant,rate,")
    assert (folder / "kills.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("draw", "what"),
    [
        (capacity_report.plot, [probe("fixed", 1024), probe("psi", 4096, live_cells=900), probe("psi", 512)]),
        (capacity_report.plot, [probe("psi", 512, "killed")]),
        (oom_report.plot, [trial(variant) for variant in ("fixed", "psi-file", "psi-memory", "file-only")]),
    ],
)
@pytest.mark.filterwarnings("ignore:No artists with labels")
def test_plots_are_drawn_from_whatever_there_is(tmp_path, draw, what):
    assert (tmp_path / draw(tmp_path, what)).stat().st_size > 4000


@pytest.mark.parametrize(("rate", "words"), [(10.0, "10 MB/s"), (0.0, "as fast as it can")])
def test_rates_are_read_as_they_are_said(rate, words):
    assert rate_words(rate) == words


@pytest.mark.parametrize(
    ("kind", "wrong", "words"),
    [
        (OomOptions, {"runs": 0}, "--runs 0 is not usable"),
        (OomOptions, {"ctx": -1}, "--ctx -1 is not usable"),
        (OomOptions, {"rates": ()}, "--rates is not usable"),
        (OomOptions, {"rates": (10.0, -1.0)}, "--rates .* is not usable"),
        (OomOptions, {"rates": (10.0, float("nan"))}, "--rates nan"),
        (OomOptions, {"rates": (10.0, 10.0)}, "each once"),
        (OomOptions, {"hold_s": float("nan")}, "--hold-s nan"),
        (OomOptions, {"variants": ("fixed", "slow")}, "--variants"),
        (CapacityOptions, {"limits": (1,)}, "--limits"),
        (CapacityOptions, {"tokens": 256}, "--tokens 256"),
        (CapacityOptions, {"chunk": 0}, "--chunk 0"),
        (CapacityOptions, {"resolution": 1.0}, "--resolution 1.0"),
        (CapacityOptions, {"least_tokens_s": 0.0}, "--least-tokens-s 0.0"),
        (LatencyOptions, {"onsets": 0}, "--onsets 0"),
        (LatencyOptions, {"control": -1}, "--control -1"),
        (LatencyOptions, {"rate": -5.0}, "--rate -5.0"),
        (LatencyOptions, {"hold_max_s": 0.5}, "--hold-max-s 0.5"),
        (LatencyOptions, {"avg10": 10.0}, "--avg10 10.0"),
        (LatencyOptions, {"variant": "fixed"}, "one that is governed"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_their_option(kind, wrong, words):
    with pytest.raises(BadInputError, match=words) as caught:
        chosen(kind(), wrong)
    assert "\n" not in str(caught.value)


def test_all_variants_go_through_the_same_rates_whatever_their_number():
    variants = ("fixed", "psi-file", "psi-memory", "file-only")
    order = list(schedule(OomOptions(runs=32, variants=variants)))
    assert Counter(variant for variant, _ in order) == dict.fromkeys(variants, 8)
    assert len({tuple(sorted(rate for name, rate in order if name == variant)) for variant in variants}) == 1
