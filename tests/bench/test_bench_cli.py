"""`psi-kv bench`: what reaches a scene, what is printed and kept, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys

import msgspec
import pytest
from bench_help import run

from psi_kv_governor.cli import bench as stub
from psikv_bench import cli as bench_cli
from psikv_bench import options as bench_options
from psikv_bench.figures import Asked, figure
from psikv_bench.record import Table
from psikv_bench.scene import Scene
from psikv_bench.scenes import oom, trim


@pytest.fixture
def scene(machine, monkeypatch):
    """Makes the scenes measure `values` against >= 2, and notes what they were asked for."""
    asked = []

    def install(*values: float, interrupted: bool = False):
        def measure(recorder):
            asked.append(recorder)
            recorder.say("measuring", new=True)
            figures = [
                figure("speed", "x", values, Asked(">=", 2.0), case="one thread"),
                figure("bytes back", "share", [0.975], Asked(">=", 0.95, "min")),
                figure("noise", "logits", [3.0]),
            ]
            table = Table(title="Kills", columns=["variant", "runs"], rows=[["governed", "[7]"]])
            report = recorder.report(
                figures, [1], interrupted=interrupted, tables=[table], notes=["what has to be known"]
            )
            return recorder.save(report)

        for module in (trim, oom):
            old = module.SCENE
            new = Scene(about=old.about, options=old.options, quick=old.quick, run=measure)
            monkeypatch.setattr(module, "SCENE", new)
        return asked

    return install


def test_what_was_asked_is_shown_beside_what_was_measured(scene):
    scene(2.5, 3.0, 2.75)
    done = run("trim")
    assert done.exit_code == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if "speed" in line)
    for word in (">= 2", "2.75 x", "2.5 to 3", "pass"):
        assert word in row
    for word in ("97.5%", "one thread", "any.gguf", "Kills", "[7]", "what has to be known"):
        assert word in done.stdout
    assert "measuring" in done.stderr


def test_a_missed_figure_ends_with_status_1_and_one_line_that_says_which(scene):
    scene(1.0, 1.5)
    done = run("trim", "--quick")
    assert done.exit_code == 1
    assert "MISSED: speed" in done.stdout
    assert done.stderr.splitlines()[-1] == "psi-kv: error: missed: speed (one thread) is 1.25 x, asked >= 2"


def test_ctrl_c_reports_what_is_finished(scene):
    scene(2.5, interrupted=True)
    done = run("oom")
    assert done.exit_code == 130
    assert "2.5 x" in done.stdout
    assert done.stderr.splitlines()[-1] == "psi-kv: interrupted"


def test_json_is_the_report_alone_and_what_is_kept(scene, tmp_path):
    scene(1.0)
    done = run("trim", "--json", "--out-dir", str(tmp_path / "kept"))
    assert done.exit_code == 1
    report = json.loads(done.stdout)
    assert report["passed"] is False
    assert [entry["name"] for entry in report["figures"]] == ["speed", "bytes back", "noise"]
    assert report["figures"][0]["asked"] == {"sign": ">=", "bound": 2.0, "statistic": "median"}
    assert (tmp_path / "kept/result.json").read_text() == done.stdout


def test_options_reach_the_scene_and_change_the_quick_form(scene, tmp_path):
    asked = scene(2.5)
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF")
    quick = trim.SCENE.quick
    assert run("trim", "--quick", "-m", str(other), "-t", "3", "--repeats", "7").exit_code == 0
    assert asked.pop().options == msgspec.structs.replace(quick, model=str(other), threads=3, repeats=7)
    arguments = (
        "--runs",
        "9",
        "--rates",
        "25,0",
        "--variants",
        "fixed,psi-file",
        "--no-mmap",
        "--swap",
        "zram",
    )
    assert run("oom", *arguments, "--out-dir", str(tmp_path / "out"), "--resume").exit_code == 0
    recorder = asked.pop()
    options = recorder.options
    assert (options.runs, options.rates, options.variants) == (9, (25.0, 0.0), ("fixed", "psi-file"))
    assert (options.mmap, options.swap, options.ctx) == (False, "zram", 8192)
    assert recorder.folder == tmp_path / "out"


@pytest.mark.parametrize(
    "arguments",
    [
        ("trim", "--threads", "0"),
        ("trim", "--repeats", "none"),
        ("trim", "--out-dir", "/proc/nowhere"),
        ("trim", "--resume"),
        ("speed",),
        ("trim", "--fast"),
        ("oom", "--rates", "fast"),
        ("oom", "--variants", "fixed,slow"),
    ],
)
def test_bad_input_ends_with_status_2_before_anything_is_measured(scene, arguments):
    asked = scene(2.5)
    done = run(*arguments)
    assert done.exit_code == 2
    assert "Traceback" not in done.output
    assert not asked


@pytest.mark.parametrize("name", bench_cli.SCENES)
def test_every_scene_has_a_help_of_its_own_with_a_line_for_each_option(name):
    done = run(name, "--help")
    assert done.exit_code == 0, done.output
    found = bench_cli.import_module(f"psikv_bench.scenes.{name}").SCENE
    for field in type(found.options).__struct_fields__:
        assert bench_options.flag(field) in done.stdout
    assert "Examples:" in done.stdout


def test_a_missing_model_is_named(tmp_path):
    done = run("trim", "--model", str(tmp_path / "gone.gguf"))
    assert done.exit_code == 2
    assert "gone.gguf" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_the_benchmarks_one_line_says_how_to_get_them():
    code = "import sys; sys.path = [path for path in sys.path if not path.endswith('benchmarks')]\n"
    code += "from psi_kv_governor.cli import main\nmain(['bench', 'trim', '--quick', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"psi-kv: error: {stub.MISSING}\n"
    assert "pip install ./benchmarks" in stub.MISSING


def test_the_package_imports_no_benchmark():
    code = "import sys, psi_kv_governor.cli.demo, psi_kv_governor.cli.tune, psi_kv_governor.cli.doctor\n"
    code += "print([name for name in sys.modules if name.startswith(('psikv_bench', 'matplotlib'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
