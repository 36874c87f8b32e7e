"""`psi-kv bench oom`, `capacity` and `latency`: what reaches them, what they print, and how they end."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from psi_kv_governor.bench.pen import Sandbox
from psi_kv_governor.bench.record import Asked, Options, Recorder, figure
from psi_kv_governor.bench.script import MIB
from psi_kv_governor.bench.trials import capacity_bench, latency_bench, oom_bench
from psi_kv_governor.bench.trials.keep import Table, TrialsReport

from psi_kv_governor import cli, model

MODULES = {"oom": oom_bench, "capacity": capacity_bench, "latency": latency_bench}


def run(*arguments: str):
    return CliRunner().invoke(cli.main, ["bench", *arguments])


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Makes every benchmark report `value` against >= 2, and notes what it was told."""
    file = tmp_path / "any.gguf"
    file.write_bytes(b"GGUF")
    told = []
    monkeypatch.setattr(model, "check", lambda path: None)
    monkeypatch.setattr(model, "demo_model_path", lambda: file)

    def install(value: float, interrupted: bool = False):
        def measure(options, asked, folder, say, *, resume):
            told.append((options, asked, folder, resume))
            say("measuring")
            found = [figure("gain", "x", [value], Asked(">=", 2.0), case="176 MiB")]
            return TrialsReport(
                header=Recorder("oom", options, [1]).report(found).header,
                options={},
                interrupted=interrupted,
                passed=value >= 2.0,
                figures=found,
                tables=[Table(title="Kills", columns=["variant", "runs"], rows=[["governed", "[7]"]])],
                notes=["what has to be known"],
                rows=[],
            )

        for module in MODULES.values():
            monkeypatch.setattr(module, "run", measure)
        return told

    return install


@pytest.mark.parametrize("name", MODULES)
def test_tables_verdicts_and_notes_are_printed(bench, name):
    bench(2.5)
    done = run(name)
    assert done.exit_code == 0, done.stderr
    for words in (
        "Kills",
        "governed",
        "[7]",
        "pass: gain (176 MiB): 2.5 x; asked >= 2",
        "what has to be known",
    ):
        assert words in done.stdout


def test_a_missed_figure_ends_with_status_1_and_one_line(bench):
    bench(1.0)
    done = run("capacity", "--quick")
    assert done.exit_code == 1
    assert done.stderr.splitlines() == ["psi-kv: error: MISSED: gain (176 MiB): 1 x; asked >= 2"]


def test_ctrl_c_reports_what_is_finished(bench):
    bench(2.5, interrupted=True)
    done = run("oom")
    assert done.exit_code == 130
    assert "pass: gain" in done.stdout
    assert done.stderr.split() == ["psi-kv:", "interrupted"]


def test_json_is_the_report_alone(bench):
    bench(1.0)
    done = run("latency", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["figures"][0]["name"] == "gain"


def test_options_reach_the_bench_and_change_the_quick_form(bench, tmp_path):
    told = bench(2.5)
    out = tmp_path / "out"
    assert (
        run("oom", "--quick", "--runs", "9", "--rates", "25,0", "--out-dir", str(out), "--resume").exit_code
        == 0
    )
    options, asked, folder, resume = told.pop()
    assert isinstance(options, Options)
    assert (options.quick, folder, resume) == (True, out, True)
    assert (asked.runs, asked.rates, asked.mmap) == (9, (25.0, 0.0), oom_bench.QUICK.mmap)
    assert run("oom", "--limit-mib", "300", "--no-mmap", "-t", "2").exit_code == 0
    _, asked, folder, resume = told.pop()
    assert (asked.limit_bytes, asked.mmap, asked.threads, folder, resume) == (
        300 * MIB,
        False,
        2,
        None,
        False,
    )
    assert run("capacity", "--limits", "176,200.5", "--swap", "zram").exit_code == 0
    assert told.pop()[1].limits_bytes == (176 * MIB, int(200.5 * MIB))
    assert run("latency", "--modes", "idle,decode", "--control", "0").exit_code == 0
    asked = told.pop()[1]
    assert (asked.modes, asked.control) == (("idle", "decode"), 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("oom", "--runs", "0"), "runs = 0"),
        (("oom", "--rates", "fast"), "--rates 'fast'"),
        (("oom", "--rates", "-5"), "rates are MB/s"),
        (("oom", "--resume"), "--out-dir"),
        (("oom", "--out-dir", "/proc/nowhere"), "--out-dir"),
        (("capacity", "--limits", "1"), "16 or more"),
        (("capacity", "--resolution", "0.5"), "a factor above 1"),
        (("capacity", "--out-dir", "/proc/nowhere"), "--out-dir"),
        (("latency", "--modes", "decode,sleep"), "there is no mode 'sleep'"),
        (("latency", "--avg10", "10"), "avg10 = 10.0"),
        (("latency", "--hold-s", "nan"), "hold_s = nan"),
        (("latency", "--swap", "disk"), "disk"),
    ],
)
def test_bad_input_ends_with_status_2_before_anything_is_measured(monkeypatch, tmp_path, arguments, words):
    file = tmp_path / "any.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(model, "check", lambda path: None)
    monkeypatch.setattr(model, "demo_model_path", lambda: file)
    monkeypatch.setattr(Sandbox, "available", staticmethod(lambda swap="none": (True, "")))
    done = run(*arguments)
    assert done.exit_code == 2
    assert words in done.stderr
    assert not done.stdout


@pytest.mark.parametrize("name", MODULES)
def test_without_the_right_to_make_cgroups_one_line_says_so(monkeypatch, tmp_path, name):
    file = tmp_path / "any.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(model, "check", lambda path: None)
    monkeypatch.setattr(model, "demo_model_path", lambda: file)
    monkeypatch.setattr(Sandbox, "available", staticmethod(lambda swap="none": (False, "run it as root")))
    done = run(name)
    assert done.exit_code == 1
    assert done.stderr.splitlines() == [
        "psi-kv: error: this needs a memory cgroup of its own: run it as root"
    ]


@pytest.mark.parametrize("name", MODULES)
def test_without_a_model_one_line_says_how_to_get_it(monkeypatch, tmp_path, name):
    monkeypatch.setenv("PSI_KV_MODELS", str(tmp_path))
    done = run(name)
    assert done.exit_code == 1
    assert "psi-kv model fetch" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    missing = run(name, "--model", str(tmp_path / "none.gguf"))
    assert missing.exit_code == 2
    assert len(missing.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", MODULES)
def test_help_has_an_example(name):
    done = run(name, "--help")
    assert done.exit_code == 0
    assert f"psi-kv bench {name} --quick" in done.stdout
