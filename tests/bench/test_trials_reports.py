"""What is made of fabricated outcomes: tables, figures, plots, files, and going on with a journal."""

from __future__ import annotations

import json
from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psi_kv_governor.bench.record import Options, Recorder, check_folder
from psi_kv_governor.bench.trials import capacity_bench, keep, latency_bench, oom_report, plots
from psi_kv_governor.bench.trials.capacity import too_slow
from psi_kv_governor.bench.trials.capacity_plan import CapacityOptions
from psi_kv_governor.bench.trials.journal import Journal, Plan
from psi_kv_governor.bench.trials.keep import TrialsReport
from psi_kv_governor.bench.trials.latency_plan import near
from psi_kv_governor.bench.trials.messages import Token, Turned
from psi_kv_governor.bench.trials.oom_plan import OomOptions, Trial, rate_words, remaining, schedule
from trials_help import MIB, onset, probe, trial

from psi_kv_governor.errors import BadInputError, PsiKvError

PLAN = Plan(bench="oom", model="any.gguf", model_bytes=100, options=OomOptions())


class TestOom:
    def test_each_kind_of_end_is_told_apart(self):
        trials = [
            trial(),
            trial(model_killed=True, whole=None),
            trial(neighbour_killed=True),
            trial(model_killed=True, neighbour_killed=True, whole=None),
            trial(stuck=True, whole=False),
        ]
        found = oom_report.cell("psi", 100.0, trials)
        assert (found.runs, found.killed, found.model_killed, found.neighbour_killed, found.stuck) == (
            5,
            3,
            2,
            2,
            1,
        )
        assert (found.survived, found.whole) == (3, 2)
        assert found.low < 0.6 < found.high
        assert (found.p50_s, found.p99_s) == (0.03, 0.5)

    def test_one_kill_of_a_governed_run_up_to_the_asked_ramp_misses_the_target(self):
        good = [trial(rate=200.0), trial(rate=0.0, model_killed=True), trial("fixed", model_killed=True)]
        assert [one.passed for one in oom_report.figures(good)] == [True, True, None]
        bad = [*good, trial(rate=200.0, neighbour_killed=True), trial("fixed"), trial("fixed")]
        assert [one.passed for one in oom_report.figures(bad)] == [False, False, None]

    def test_the_table_of_the_field_counts_per_thousand(self):
        trials = [trial("fixed", model_killed=True)] * 3 + [trial("fixed")] + [trial()] * 4
        field = oom_report.tables(trials)[-1]
        assert [row[0] for row in field.rows] == ["static", "governed"]
        assert field.rows[0][3].startswith("750 (")
        assert field.rows[1][3].startswith("0 (0 to ")

    def test_a_kill_is_explained_by_the_governors_last_turn(self):
        turn = Turned(
            time_s=1.0,
            some=0.5,
            full=0.2,
            headroom_bytes=0,
            live_cells=77,
            action="none",
            cells=0,
            mode="holding",
            reason="the floor holds",
        )
        told = oom_report.notes([trial(model_killed=True, trail=[turn], number=9)])
        assert any("run 9" in note and "the floor holds" in note and "77 live" in note for note in told)

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
        ahead = list(remaining(OomOptions(runs=first + more), short))
        assert Counter(short) + Counter(ahead) >= Counter(long)
        assert list(remaining(OomOptions(runs=first), short)) == []
        assert len(ahead) <= more + 16  # the shorter one's last round may have had other rates


class TestCapacity:
    def test_the_gain_is_that_of_the_longest_that_survived(self):
        probes = [
            probe("fixed", 1024),
            probe("fixed", 2048, "slow"),
            probe("psi", 2048),
            probe("psi", 4096, live_cells=1024, spilled_cells=3072),
            probe("psi", 8192, "killed"),
        ]
        gain, live, speed = capacity_bench.figures(probes)
        assert (gain.median, gain.passed) == (4.0, True)
        assert live.median == 0.25
        assert speed.median == 1.0
        best = capacity_bench.best_table(probes)
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
        assert too_slow(decoded, silent_s, CapacityOptions(chunk=32, tokens=8), 10.0) is slow

    def test_where_nothing_survives_nothing_is_claimed(self):
        probes = [probe("fixed", 256, "killed"), probe("psi", 256)]
        assert list(capacity_bench.figures(probes)) == []
        assert capacity_bench.best_table(probes).rows[0][2] == "none"

    def test_what_was_left_out_comes_from_the_model_in_peace(self):
        peace = probe("fixed", 256, token_s=[0.01], limit_bytes=0, peak_bytes=150 * MIB)
        found = capacity_bench._completed(CapacityOptions(), peace, quick=False)
        assert found.least_tokens_per_s == pytest.approx(10.0)
        assert list(found.limits_bytes) == [176 * MIB, 200 * MIB, 248 * MIB]
        assert capacity_bench._completed(CapacityOptions(), peace, quick=True).limits_bytes == (176 * MIB,)
        given = CapacityOptions(limits_bytes=(99 * MIB,), least_tokens_per_s=3.0)
        assert capacity_bench._completed(given, peace, quick=True) == given
        blind = probe("fixed", 256, limit_bytes=0, peak_bytes=0)
        with pytest.raises(PsiKvError, match="--limits"):
            capacity_bench._completed(CapacityOptions(), blind, quick=False)


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
        p50, p99, *_ = latency_bench.figures(onsets)
        assert (p50.passed, p99.passed) == (True, True)
        slow = list(latency_bench.figures([onset(returned_s=0.3 + 0.5)]))
        assert [one.passed for one in slow[:2]] == [False, False]

    def test_pollers_are_judged_on_governed_and_on_ungoverned_onsets(self):
        onsets = [
            onset(),
            onset(variant="fixed", returned_s=None, poll_s=[2.3, None]),
            onset(variant="fixed", returned_s=None, poll_s=[4.3, 5.3]),
        ]
        rows = {row[1]: row for row in latency_bench.reaction_table(onsets).rows}
        assert rows["poll avg10 every 1 s, governed"][5] == "1"
        ungoverned = rows["poll avg10 every 1 s, ungoverned"]
        assert ungoverned[5] == "0"
        assert ungoverned[6:9] == ["2000", "4000", "4000"]
        assert rows["poll avg10 every 2 s, ungoverned"][5] == "1"
        assert rows["governor, bytes back"][2] == "1"

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


class TestJournal:
    def test_an_interrupted_run_goes_on_where_it_stopped(self, tmp_path):
        path = tmp_path / "trials.jsonl"
        journal = Journal(path, PLAN, Trial, go_on=False)
        journal.add(trial(number=1))
        journal.add(trial(number=2))
        assert Journal(path, PLAN, Trial, go_on=True).parts == journal.parts

    def test_a_line_that_was_cut_by_a_crash_is_done_again(self, tmp_path):
        path = tmp_path / "trials.jsonl"
        Journal(path, PLAN, Trial, go_on=False).add(trial(number=1))
        with path.open("ab") as file:
            file.write(msgspec.json.encode(trial(number=2))[:50])
        again = Journal(path, PLAN, Trial, go_on=True)
        assert [part.number for part in again.parts] == [1]
        again.add(trial(number=2))
        assert [part.number for part in Journal(path, PLAN, Trial, go_on=True).parts] == [1, 2]

    def test_runs_of_other_options_are_not_mixed(self, tmp_path):
        path = tmp_path / "trials.jsonl"
        Journal(path, PLAN, Trial, go_on=False)
        assert Journal(path, PLAN, Trial, go_on=True).parts == []
        other = msgspec.structs.replace(PLAN, options=OomOptions(context_tokens=99))
        with pytest.raises(BadInputError, match="other options"):
            Journal(path, other, Trial, go_on=True)

    def test_a_finished_run_is_not_written_over(self, tmp_path):
        Journal(tmp_path / "trials.jsonl", PLAN, Trial, go_on=False)
        with pytest.raises(BadInputError, match="--resume"):
            Journal(tmp_path / "trials.jsonl", PLAN, Trial, go_on=False)

    def test_resume_needs_a_folder(self):
        with pytest.raises(BadInputError, match="--out-dir"):
            Journal(None, PLAN, Trial, go_on=True)

    def test_a_damaged_line_is_named(self, tmp_path):
        path = tmp_path / "trials.jsonl"
        Journal(path, PLAN, Trial, go_on=False)
        with path.open("ab") as file:
            file.write(b"{}\n")
        with pytest.raises(BadInputError, match="line 2"):
            Journal(path, PLAN, Trial, go_on=True)


def a_report(tmp_path, trials, interrupted=False) -> TrialsReport:
    model = tmp_path / "any.gguf"
    model.write_bytes(b"GGUF")
    found = list(oom_report.figures(trials))
    return TrialsReport(
        header=Recorder("oom", Options(model=model), [1]).report(found).header,
        options={"asked": OomOptions()},
        interrupted=interrupted,
        passed=not any(one.passed is False for one in found),
        figures=found,
        tables=oom_report.tables(trials),
        notes=["a note"],
        rows=msgspec.to_builtins(oom_report.cells(trials)),
    )


def test_everything_is_kept_in_the_folder(tmp_path):
    trials = [trial("fixed", rate=rate, model_killed=True, whole=None) for rate in (10.0, 0.0)]
    trials += [trial(rate=rate) for rate in (10.0, 0.0)]
    folder = tmp_path / "out"
    check_folder(folder)
    draw = plots.drawn(plots.kills, oom_report.cells(trials))
    keep.save(
        a_report(tmp_path, trials, interrupted=True), folder, "trials.csv", oom_report.records(trials), draw
    )
    result = json.loads((folder / "result.json").read_text())
    assert result["interrupted"] is True
    assert [row["killed"] for row in result["rows"]] == [1, 1, 0, 0]
    assert result["header"]["versions"]["python"]
    summary = (folder / "summary.md").read_text()
    for word in ("Interrupted", "as fast as it can", "pass: runs with a kill", "a note", "Linux"):
        assert word in summary
    lines = (folder / "trials.csv").read_text().splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("number,variant,rate,")
    assert (folder / "kills.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("draw", "what"),
    [
        (plots.capacity, [probe("fixed", 1024), probe("psi", 4096, live_cells=900), probe("psi", 512)]),
        (plots.capacity, [probe("psi", 512, "killed")]),
        (plots.reactions, [onset(), onset("idle", variant="fixed", poll_s=[1.0, None], returned_s=None)]),
    ],
)
@pytest.mark.filterwarnings("ignore:No artists with labels")
def test_plots_are_drawn_from_whatever_there_is(tmp_path, draw, what):
    assert plots.drawn(draw, what)(tmp_path) == []
    assert (tmp_path / f"{draw.__name__}.png").stat().st_size > 5000


def test_a_folder_that_cannot_be_made_is_bad_input(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BadInputError, match="--out-dir"):
        check_folder(tmp_path / "file" / "inside")


@pytest.mark.parametrize(("rate", "words"), [(10.0, "10 MB/s"), (0.0, "as fast as it can"), (None, "none")])
def test_rates_are_read_as_they_are_said(rate, words):
    assert rate_words(rate) == words
