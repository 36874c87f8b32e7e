"""The runs are played by turns, kept one by one, and reported: in JSON, CSV, Markdown and plots."""

from __future__ import annotations

import csv
import io
import json

import pytest
from psi_kv_governor.bench.pen import Pen
from psi_kv_governor.bench.pressure import report
from psi_kv_governor.bench.pressure.options import PressureOptions
from psi_kv_governor.bench.pressure.play import Benchmark
from psi_kv_governor.bench.pressure.result import Run
from psi_kv_governor.bench.pressure.setting import choose_setting
from psi_kv_governor.bench.script import MIB

from psi_kv_governor.errors import PsiKvError
from scene_results import moment, scene_result

PNG = b"\x89PNG\r\n"


class Stage:
    """A benchmark of scenes that nobody plays: it is interrupted in run `ends_at`, or each gives `found`."""

    def __init__(self, folder, ends_at: int = 0, found=None, **options) -> None:
        self.folder = folder / "report"
        model = folder / "model.gguf"
        model.write_bytes(b"GGUF")
        given = {"repeats": 2, "variant_cooldown_s": 0.0, "memory_limit_mib": 400, **options}
        self.options = PressureOptions(model=str(model), **given)
        self.ends_at, self.found = ends_at, found
        self.played: list[str] = []
        self.begun: list[tuple[int, int, str]] = []
        self.benchmark = Benchmark(self.options, choose_setting(self.options), self.folder, self.run)

    def run(self, variant, scene, on_event):
        if len(self.played) + 1 == self.ends_at:
            raise KeyboardInterrupt
        self.played.append(variant)
        if self.found is not None:
            return self.found
        speed = {"fixed": 4.0, "reference": 5.0, "psi": 16.0}[variant]
        given_up = {"trims": 2, "bytes_returned": 60 * MIB, "restored": True} if variant == "psi" else {}
        return scene_result(variant, tokens_per_s=speed + len(self.played) / 10, **given_up)

    def play(self):
        return self.benchmark.play(lambda event: None, lambda *begun: self.begun.append(begun))

    def kept(self):
        return json.loads((self.folder / "result.json").read_text())


@pytest.fixture
def stage(tmp_path, monkeypatch):
    monkeypatch.setattr(Pen, "available", staticmethod(lambda swap="none": (True, "")))
    return lambda **options: Stage(tmp_path, **options)


def test_variants_are_played_by_turns_over_the_repeats(stage):
    scene = stage(variant_order="psi-first")
    result = scene.play()
    assert scene.played == ["psi", "reference", "fixed"] * 2
    assert scene.begun[0] == (1, 6, "psi")
    assert scene.begun[-1] == (6, 6, "fixed")
    assert [(run.number, run.repeat) for run in result.runs] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 2),
        (5, 2),
        (6, 2),
    ]
    assert result.complete


def test_the_pause_is_between_runs_and_not_before_the_first(stage, monkeypatch):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    stage(variant_cooldown_s=7.0, repeats=1).play()
    assert slept == [7.0, 7.0]


def test_interrupted_it_keeps_the_runs_that_were_finished(stage):
    scene = stage(ends_at=6)
    with pytest.raises(KeyboardInterrupt):
        scene.play()
    kept = scene.kept()
    assert kept["complete"] is False
    assert [run["result"]["variant"] for run in kept["runs"]] == [
        "fixed",
        "reference",
        "psi",
        "fixed",
        "reference",
    ]
    speed = next(entry for entry in kept["report"]["figures"] if entry["name"] == "psi / fixed, tokens/s")
    assert len(speed["values"]) == 1
    assert "interrupted after 5 runs" in (scene.folder / "summary.md").read_text()
    assert scene.benchmark.finished == 5


def test_interrupted_in_the_first_run_there_is_nothing_to_keep(stage):
    scene = stage(ends_at=1)
    with pytest.raises(KeyboardInterrupt):
        scene.play()
    assert list(scene.folder.iterdir()) == []
    assert report.save_plots(scene.folder, scene.benchmark.result(complete=False)) == []


def test_the_result_says_on_what_and_how_it_was_measured_and_names_no_folder(stage, tmp_path):
    scene = stage()
    scene.play()
    text = (scene.folder / "result.json").read_text()
    kept = json.loads(text)
    assert kept["complete"] is True
    assert kept["options"]["model"] == kept["report"]["header"]["model"] == "model.gguf"
    assert kept["report"]["header"]["machine"]["kernel"].startswith("Linux ")
    assert "llama-cpp-python" in kept["report"]["header"]["versions"]
    assert kept["setting"]["limit_bytes"] == 400 * MIB
    assert kept["setting"]["governor"]["sink_cells"] == 64
    assert kept["setting"]["reference"]["threshold"] == 0.1
    assert len(kept["runs"][0]["result"]["token_s"]) == 100
    assert "moments" not in kept["runs"][0]["result"]
    assert str(tmp_path) not in text


def test_samples_are_a_line_a_look_with_nothing_where_nobody_tells():
    looks = [moment(-0.1), moment(0.5, stage="pressed", inside=None, token_s=0.25, tokens=3)]
    run = Run(number=4, repeat=2, result=scene_result("psi", moments=looks))
    first, second = csv.DictReader(io.StringIO(report.samples_csv([run])))
    assert (first["time_s"], first["run"], first["variant"], first["stage"]) == ("-0.100", "4", "psi", "calm")
    assert (first["inside_some"], first["outside_full"], first["token_s"]) == ("0.2500", "0.1000", "")
    assert (second["inside_some"], second["token_s"], second["tokens"]) == ("", "0.2500", "3")
    assert second["neighbour_bytes"] == "500000000"
    assert set(first) >= {"resident_bytes", "swap_bytes", "cells"}


def test_the_summary_has_the_columns_the_spread_and_the_verdicts(stage):
    scene = stage()
    result = scene.play()
    text = (scene.folder / "summary.md").read_text()
    for words in (
        "| run | variant | decoded | tok/s | prunes | final KV | external PSI some/full |",
        "| 3 | psi | 100 | 16.3 | 2 | 4,000 | 20%/10% | 25%/12% | 62.9 MB |",
        "- met: psi / fixed, tokens/s 3.87 (3.77 to 3.98), asked >= 2.5",
        "- MISSED: psi / fixed, peak resident 1 (1 to 1), asked <= 0.5",
        "plain llama_cpp.Llama for fixed and reference",
    ):
        assert words in text
    assert text == report.summary(result)


def test_plots_are_drawn_of_what_there_is(stage):
    scene = stage(ends_at=4)
    with pytest.raises(KeyboardInterrupt):
        scene.play()
    paths = report.save_plots(scene.folder, scene.benchmark.result(complete=False))
    assert [path.name for path in paths] == ["timeline.png", "runs.png"]
    assert all(path.read_bytes().startswith(PNG) for path in paths)


def test_plots_of_runs_without_stall_tokens_or_neighbour_are_drawn(stage):
    bare = scene_result(
        "fixed", token_s=[], tokens=0, tokens_per_s=0.0, p50_s=None, p99_s=None, max_s=None, outside=None,
        stall=None, stall_full=None, neighbour_bytes_per_s=None, neighbour_work=[],
        moments=[moment(0.0, inside=None, outside=None)],
    )  # fmt: skip
    scene = stage(pressure_mib=0, repeats=1, variants=("fixed",), found=bare)
    result = scene.play()
    assert len(report.save_plots(scene.folder, result)) == 2
    assert "no neighbour" in (scene.folder / "summary.md").read_text()


def test_a_folder_that_takes_nothing_is_one_line(stage):
    scene = stage()
    result = scene.play()
    blocked = scene.folder / "file"
    blocked.write_bytes(b"")
    with pytest.raises(PsiKvError, match="cannot write"):
        report.save(blocked / "below", result)
