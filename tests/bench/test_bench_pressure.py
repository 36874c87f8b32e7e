"""`psi-kv bench pressure`: what is looked at beforehand, what it prints and keeps, and how it ends."""

from __future__ import annotations

import json

import pytest
from bench_help import run

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.sandbox.load import MIB
from psikv_bench.pressure import preflight
from psikv_bench.scene import Scene
from psikv_bench.scenes import pressure
from scene_results import scene_result

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
            "result.json", "pressure.csv", "summary.md", "timeline.png", "journal.jsonl",
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
