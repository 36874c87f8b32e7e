"""`psi-kv bench`: what reaches a scene, what is printed and kept, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys

import msgspec
import pytest
from click.testing import CliRunner

from psi_kv_governor import cli, model
from psi_kv_governor.cli import bench as stub
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.gguf_file import GgufFile
from psi_kv_governor.sandbox.host import MIB
from psi_kv_governor.sandbox.sandbox import Sandbox
from psikv_bench import cli as bench_cli
from psikv_bench import options as bench_options
from psikv_bench.figures import Asked, figure
from psikv_bench.pressure import preflight, setting
from psikv_bench.pressure.setting import Size
from psikv_bench.record import Table
from psikv_bench.scene import Scene
from psikv_bench.scenes import oom, pressure, trim
from scene_results import scene_result


def run(*arguments: str):
    return CliRunner().invoke(cli.main, ["bench", *arguments])


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine on which all is well, as far as sandboxes and the model go; each answer can be changed."""
    file = tmp_path / "any.gguf"
    file.write_bytes(b"GGUF")
    able = {"none": (True, ""), "zram": (True, ""), "host": (True, "")}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Sandbox, "available", staticmethod(lambda swap="none": able[swap]))
    for where in (bench_options, preflight):
        monkeypatch.setattr(where, "demo_model_path", lambda: file)
    monkeypatch.setattr(model, "check", lambda path: None)
    monkeypatch.setattr(preflight, "check", lambda path: GgufFile(path, 98_000_000, 3, "llama", 1))
    size = Size(resident_bytes=64 * MIB, weights_bytes=50 * MIB, cell_bytes=100)
    monkeypatch.setattr(setting, "size_of", lambda *_: size)
    return able


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
    assert "FAIL" in done.stdout
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


# -- pressure ----------------------------------------------------------------------------------------------

SHORT = ("--repeats", "1", "--memory-limit-mib", "64", "--variant-cooldown-s", "0")


def lines(done) -> list[str]:
    return done.stdout.splitlines()


class TestPreflight:
    def test_a_line_on_each_thing_and_status_0_where_all_is_well(self, machine, tmp_path):
        done = run("pressure", "--preflight-only", "--swap", "none", "--memory-limit-mib", "64")
        assert done.exit_code == 0, done.stdout
        assert [line.split()[1] for line in lines(done)] == [
            "psi", "cgroup", "swap", "model", "out-dir", "memory",
        ]  # fmt: skip
        assert all(line.startswith("ok") for line in lines(done))
        assert not (tmp_path / "out").exists()

    def test_json_is_the_same(self, machine):
        done = run("pressure", "--preflight-only", "--json")
        assert [entry["name"] for entry in json.loads(done.stdout)][:2] == ["psi", "cgroup"]

    @pytest.mark.parametrize(
        ("missing", "name", "words"),
        [
            (
                {"zram": (False, "no zram: load it with `modprobe zram`")},
                "swap",
                "`modprobe zram`; or choose",
            ),
            ({"none": (False, "run it as root")}, "cgroup", "-> run it as root"),
        ],
    )
    def test_what_is_missing_is_named_with_what_to_do(self, machine, missing, name, words):
        machine.update(missing)
        done = run("pressure", "--preflight-only", "--isolate", "cgroup")
        assert done.exit_code == 1
        (line,) = [line for line in lines(done) if line.split()[1] == name]
        assert line.startswith("fail")
        assert words in line

    def test_without_psi_it_says_how_to_get_it(self, tmp_path):
        found = preflight.check_psi(tmp_path)
        assert (found.state, "psi=1" in found.remedy) == ("fail", True)

    def test_a_demo_model_that_is_not_here_is_one_of_the_lines(self, machine, monkeypatch):
        def missing():
            raise PsiKvError("the demo model is not here: run `psi-kv model fetch`")

        monkeypatch.setattr(preflight, "demo_model_path", missing)
        done = run("pressure", "--preflight-only")
        assert done.exit_code == 1
        (line,) = [line for line in lines(done) if line.split()[1] == "model"]
        assert "psi-kv model fetch" in line

    def test_too_little_memory_is_said_beforehand(self, machine):
        done = run("pressure", "--preflight-only", "--memory-limit-mib", str(1 << 40))
        assert done.exit_code == 1
        assert "smaller --memory-limit-mib" in lines(done)[-1]


class TestPressure:
    @pytest.fixture
    def played(self, machine, monkeypatch):
        """Has each scene end at once, with the speed that is given for its variant; the names are noted."""
        begun: list[str] = []

        def install(ends_at: int = 0, **speeds: float) -> list[str]:
            def play(variant, options, on_event):
                if len(begun) + 1 == ends_at:
                    raise KeyboardInterrupt
                begun.append(variant)
                speed = speeds[variant] + len(begun) / 100
                back = {"trims": 2, "bytes_returned": 60 * MIB, "restored": True} if variant == "psi" else {}
                return scene_result(variant, tokens_per_s=speed, p99_s=1 / speed, **back)

            old = pressure.SCENE
            new = Scene(
                about=old.about, options=old.options, quick=old.quick, checks=old.checks, keeps=old.keeps,
                run=lambda recorder: pressure.run(recorder, play),
            )  # fmt: skip
            monkeypatch.setattr(pressure, "SCENE", new)
            return begun

        return install

    @pytest.mark.parametrize(
        "arguments",
        [
            ("--variants", "fixed,fast"), ("--variants", "psi,psi"), ("--variant-order", "last"),
            ("--load", "noise"), ("--swap", "disk"), ("--isolate", "no"), ("-n", "0"), ("-c", "64"),
            ("--pressure-warmup-s", "nan"), ("--repeats", "-1"), ("--nonsense",),
            ("--load", "files", "--out-dir", "/dev/shm/psi-kv-bench"), ("--out-dir", "any.gguf/below"),
        ],
    )  # fmt: skip
    def test_bad_input_ends_with_status_2_before_anything_is_run(self, machine, tmp_path, arguments):
        done = run("pressure", *arguments)
        assert done.exit_code == 2, done.output
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()

    def test_without_the_right_to_make_a_cgroup_it_ends_with_status_1(self, machine):
        machine["none"] = (False, "no right to make a memory cgroup: run it as root")
        done = run("pressure", "--isolate", "cgroup")
        assert done.exit_code == 1
        assert "run it as root" in done.stderr

    def test_a_missed_figure_ends_with_status_1_and_all_is_kept(self, played, tmp_path):
        played(fixed=4.0, psi=6.0)
        done = run("pressure", "--variants", "fixed,psi", *SHORT, "--out-dir", str(tmp_path / "r"))
        assert done.exit_code == 1
        assert "external PSI some/full" in done.stdout
        assert done.stderr.splitlines()[-1].startswith(
            "psi-kv: error: missed: psi / fixed, tokens/s (ratios)"
        )
        assert {path.name for path in (tmp_path / "r").iterdir()} == {
            "result.json", "pressure.csv", "summary.md", "timeline.png", "runs.png", "journal.jsonl",
        }  # fmt: skip
        summary = (tmp_path / "r/summary.md").read_text()
        for words in (
            "| run | variant | decoded | tok/s | prunes | final KV | external PSI some/full |",
            "| 2 | psi | 100 | 6.0 | 2 | 4,000 | 20%/10% | 25%/12% | 62.9 MB |",
            "MISSED: psi / fixed, peak resident (ratios): 1 x",
            "plain llama_cpp.Llama for fixed and reference",
        ):
            assert words in summary
        header, first, *_ = (tmp_path / "r/pressure.csv").read_text().splitlines()
        assert header.startswith("time_s,run,variant,stage,inside_some,inside_full,outside_some")
        assert first.startswith("-0.100,1,fixed,calm,0.2500,0.1250,0.2000,0.1000,")

    def test_variants_take_turns_over_the_repeats(self, played, tmp_path):
        begun = played(fixed=4.0, reference=5.0, psi=16.0)
        run(
            "pressure",
            *SHORT,
            "--repeats",
            "2",
            "--variant-order",
            "psi-first",
            "--out-dir",
            str(tmp_path / "r"),
        )
        assert begun == ["psi", "reference", "fixed"] * 2
        kept = json.loads((tmp_path / "r/result.json").read_text())
        assert [(row["number"], row["repeat"]) for row in kept["rows"]] == [
            (number, 1 + (number > 3)) for number in range(1, 7)
        ]
        assert kept["options"]["asked"]["model"] == "any.gguf"
        assert str(tmp_path) not in (tmp_path / "r/result.json").read_text()

    def test_interrupted_it_keeps_the_runs_that_were_finished_and_goes_on(self, played, tmp_path):
        begun = played(3, fixed=4.0, psi=16.0)
        arguments = (
            "pressure",
            "--variants",
            "fixed,psi",
            *SHORT,
            "--repeats",
            "2",
            "--out-dir",
            str(tmp_path / "r"),
        )
        assert run(*arguments).exit_code == 130
        kept = json.loads((tmp_path / "r/result.json").read_text())
        assert (kept["interrupted"], len(kept["rows"])) == (True, 2)
        played(fixed=4.0, psi=16.0)
        assert run(*arguments).exit_code == 2  # what is there is not written over
        run(*arguments, "--resume")
        assert begun == ["fixed", "psi"] * 2
        assert len(json.loads((tmp_path / "r/result.json").read_text())["rows"]) == 4

    def test_without_an_out_dir_each_report_has_a_new_folder(self, played, tmp_path):
        played(psi=6.0)
        run("pressure", "--variants", "psi", *SHORT)
        (folder,) = (tmp_path / "out").iterdir()
        assert folder.name.startswith("pressure-20")
        assert (folder / "summary.md").exists()
