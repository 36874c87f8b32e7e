"""`psi-kv bench`: what it prints, what it keeps, and how it ends."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from psi_kv_governor.bench import opening, overhead, policy_cost, trim
from psi_kv_governor.bench.record import Asked, Options, Recorder, figure

from psi_kv_governor import cli, model

MODULES = {
    "trim": trim,
    "overhead": overhead,
    "opening": opening,
    "policies": policy_cost,
}


def run(*arguments: str):
    return CliRunner().invoke(cli.main, ["bench", *arguments])


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Makes every benchmark measure `values` against >= 2, and notes what it was told."""
    file = tmp_path / "any.gguf"
    file.write_bytes(b"GGUF")
    told: list[Options] = []
    monkeypatch.setattr(model, "check", lambda path: None)
    monkeypatch.setattr(model, "demo_model_path", lambda: file)

    def install(*values: float) -> list[Options]:
        def measure(options, say):
            told.append(options)
            say("measuring")
            figures = [
                figure("speed", "x", values, Asked(">=", 2.0), case="one thread"),
                figure("bytes back", "share", [0.975], Asked(">=", 0.95, "min")),
                figure("noise", "logits", [3.0]),
            ]
            return Recorder("trim", options, [1]).report(figures)

        for module in MODULES.values():
            monkeypatch.setattr(module, "run", measure)
        return told

    return install


@pytest.mark.parametrize("name", MODULES)
def test_each_bench_shows_what_was_asked_beside_what_was_measured(bench, name):
    bench(2.5, 3.0, 2.75)
    done = run(name)
    assert done.exit_code == 0, done.stderr
    assert not done.stderr
    row = next(line for line in done.stdout.splitlines() if "speed" in line)
    for word in (">= 2", "2.75 x", "2.5 to 3", "pass"):
        assert word in row
    assert "97.5%" in done.stdout
    assert "one thread" in done.stdout
    assert "any.gguf" in done.stdout


def test_a_missed_figure_ends_with_status_1_and_one_line_that_says_which(bench):
    bench(1.0, 1.5)
    done = run("trim", "--quick")
    assert done.exit_code == 1
    assert "FAIL" in done.stdout
    assert done.stderr.splitlines() == [
        "psi-kv: error: missed: speed (one thread) is 1.25 x, asked >= 2",
    ]


def test_json_is_the_report_alone_also_when_a_figure_is_missed(bench):
    bench(1.0)
    done = run("overhead", "--json")
    assert done.exit_code == 1
    report = json.loads(done.stdout)
    assert report["passed"] is False
    assert [entry["name"] for entry in report["figures"]] == ["speed", "bytes back", "noise"]
    assert report["figures"][0]["asked"] == {"sign": ">=", "bound": 2.0, "statistic": "median"}


def test_out_keeps_the_same_report(bench, tmp_path):
    bench(2.5)
    done = run("opening", "--json", "--out", str(tmp_path / "kept.json"))
    assert (tmp_path / "kept.json").read_text() == done.stdout


def test_options_reach_the_bench(bench, tmp_path):
    told = bench(2.5)
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF")
    assert run("trim", "--quick", "--model", str(other), "--threads", "3", "--repeats", "7").exit_code == 0
    assert told == [Options(model=other, quick=True, threads=3, repeats=7)]


@pytest.mark.parametrize(
    "arguments",
    [
        ("trim", "--threads", "0"),
        ("trim", "--repeats", "none"),
        ("opening", "--out", "/nowhere/at/all.json"),
        ("speed",),
        ("trim", "--fast"),
    ],
)
def test_bad_input_ends_with_status_2_before_anything_is_measured(bench, arguments):
    told = bench(2.5)
    assert run(*arguments).exit_code == 2
    assert not told


def test_a_missing_model_is_named(tmp_path):
    done = run("trim", "--model", str(tmp_path / "gone.gguf"))
    assert done.exit_code == 2
    assert "gone.gguf" in done.stderr
    assert len(done.stderr.splitlines()) == 1
