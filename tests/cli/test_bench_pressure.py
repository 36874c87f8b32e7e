"""`psi-kv bench pressure`: what it refuses, what its preflight says, and how it ends."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from psi_kv_governor.bench.pen import Sandbox
from psi_kv_governor.bench.pressure import play, preflight, setting
from psi_kv_governor.bench.pressure.sizing import Size
from psi_kv_governor.bench.script import MIB

from psi_kv_governor import cli, model
from psi_kv_governor.cli import bench_pressure
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.gguf_file import GgufFile
from scene_results import scene_result

SHORT = ("--repeats", "1", "--memory-limit-mib", "64")


def run(*arguments: str):
    return CliRunner().invoke(cli.main, ["bench", "pressure", *arguments])


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine on which all is well, as far as pens and the model go; each answer can be changed."""
    file = tmp_path / "any.gguf"
    file.write_bytes(b"GGUF")
    able = {"none": (True, ""), "zram": (True, ""), "host": (True, "")}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Sandbox, "available", staticmethod(lambda swap="none": able[swap]))
    monkeypatch.setattr(bench_pressure, "demo_model_path", lambda: file)
    monkeypatch.setattr(preflight, "check", lambda path: GgufFile(path, 98_000_000, 3, "llama", 1))
    size = Size(resident_bytes=64 * MIB, weights_bytes=50 * MIB, cell_bytes=100)
    monkeypatch.setattr(setting, "size_of", lambda path, cells, threads: size)
    return able


def lines(done) -> list[str]:
    return done.stdout.splitlines()


class TestPreflight:
    def test_a_line_on_each_thing_and_status_0_where_all_is_well(self, machine, tmp_path):
        done = run("--preflight-only", "--swap", "none")
        assert done.exit_code == 0, done.stdout
        names = [line.split()[1] for line in lines(done)]
        assert names == ["psi", "cgroup", "swap", "model", "out-dir", "plots", "memory"]
        assert all(line.startswith("ok") for line in lines(done))
        assert not (tmp_path / "out").exists()

    def test_json_is_the_same(self, machine):
        done = run("--preflight-only", "--json")
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
        done = run("--preflight-only", "--isolate", "cgroup")
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

        monkeypatch.setattr(bench_pressure, "demo_model_path", missing)
        monkeypatch.setattr(preflight, "check", model.check)
        done = run("--preflight-only")
        assert done.exit_code == 1
        (line,) = [line for line in lines(done) if line.split()[1] == "model"]
        assert "psi-kv model fetch" in line

    def test_too_little_memory_is_said_beforehand(self, machine):
        done = run("--preflight-only", "--memory-limit-mib", str(1 << 40))
        assert done.exit_code == 1
        assert "smaller --memory-limit-mib" in lines(done)[-1]


class TestRefusals:
    @pytest.mark.parametrize(
        "arguments",
        [
            ("--variants", "fixed,fast"),
            ("--variants", "psi,psi"),
            ("--variant-order", "last"),
            ("--load", "noise"),
            ("--swap", "disk"),
            ("--isolate", "no"),
            ("-n", "0"),
            ("-c", "64"),
            ("--pressure-warmup-s", "nan"),
            ("--repeats", "-1"),
            ("--nonsense",),
        ],
    )
    def test_bad_input_ends_with_status_2_before_anything_is_run(self, machine, tmp_path, arguments):
        done = run(*arguments)
        assert done.exit_code == 2
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()

    def test_a_report_that_is_there_is_never_written_over(self, machine, tmp_path):
        kept = tmp_path / "kept"
        kept.mkdir()
        (kept / "result.json").write_text("{}")
        done = run("--out-dir", str(kept))
        assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
        assert "holds a report already: give another --out-dir" in done.stderr
        assert (kept / "result.json").read_text() == "{}"

    def test_a_folder_below_a_file_is_refused(self, machine, tmp_path):
        done = run("--out-dir", str(tmp_path / "any.gguf" / "below"))
        assert done.exit_code == 2
        assert "is not a folder" in done.stderr

    def test_files_to_be_read_do_not_lie_in_memory(self, machine):
        done = run("--load", "files", "--out-dir", "/dev/shm/psi-kv-bench")
        assert done.exit_code == 2
        assert "must lie on a disk" in done.stderr

    def test_a_missing_model_is_named(self, machine, monkeypatch, tmp_path):
        monkeypatch.setattr(preflight, "check", model.check)
        done = run("--model", str(tmp_path / "gone.gguf"))
        assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
        assert "gone.gguf" in done.stderr

    def test_without_the_right_to_make_a_cgroup_it_ends_with_status_1(self, machine):
        machine["none"] = (False, "no right to make a memory cgroup: run it as root")
        done = run("--isolate", "cgroup")
        assert done.exit_code == 1
        assert "run it as root" in done.stderr


@pytest.fixture
def played(machine, monkeypatch):
    """Has each scene end at once, with the speed that is given for its variant."""

    def install(**speeds: float) -> None:
        def scene(variant, options, on_event):
            return scene_result(variant, tokens_per_s=speeds[variant], p99_s=1 / speeds[variant])

        monkeypatch.setattr(play, "run_scene", scene)

    return install


def test_a_missed_figure_ends_with_status_1_and_one_line_that_says_which(played, tmp_path):
    played(fixed=4.0, psi=6.0)
    done = run("--variants", "fixed,psi", *SHORT, "--out-dir", str(tmp_path / "r"))
    assert done.exit_code == 1
    assert "MISSED: psi / fixed, tokens/s 1.5" in done.stdout
    assert "external PSI some/full" in done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("psi-kv: error: missed: psi / fixed, tokens/s; ")
    assert {path.name for path in (tmp_path / "r").iterdir()} == {
        "result.json", "samples.csv", "summary.md", "timeline.png", "runs.png",
    }  # fmt: skip


def test_json_is_what_is_kept(played, tmp_path):
    played(psi=6.0)
    done = run("--variants", "psi", *SHORT, "--json", "--out-dir", str(tmp_path / "r"))
    assert done.exit_code == 0, done.stderr
    shown, kept = json.loads(done.stdout), json.loads((tmp_path / "r/result.json").read_text())
    assert shown["runs"] == kept["runs"]
    assert shown["complete"] is True


def test_without_an_out_dir_each_report_has_a_new_folder(played, tmp_path):
    played(psi=6.0)
    run("--variants", "psi", *SHORT)
    (folder,) = (tmp_path / "out").iterdir()
    assert folder.name.startswith("pressure-20")
    assert (folder / "summary.md").exists()
