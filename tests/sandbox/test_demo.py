"""`psi-kv demo`: which scene it plays, what it says, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner

from psi_kv_governor.cli import demo
from psi_kv_governor.cli._demo_view import figures, verdict
from psi_kv_governor.sandbox.load import MIB
from psi_kv_governor.sandbox.sandbox import Sandbox
from psi_kv_governor.sandbox.scene import SceneResult
from sandbox_help import sandboxes_of, still_swapped_to, swap_devices_of

_PLAIN = {
    "tokens": 100, "seconds": 10.0, "tokens_per_s": 10.0, "calm_tokens_per_s": 30.0, "p50_s": 0.1,
    "p99_s": 0.2345, "peak_resident_bytes": 300 * MIB, "final_resident_bytes": 200 * MIB, "stall": 0.25,
}  # fmt: skip


def result(variant, **changes):
    """Of a plain run of ten seconds."""
    return SceneResult(variant=variant, **{**_PLAIN, **changes})


ARGV = [sys.executable, "-m", "psi_kv_governor.cli", "demo"]


FIXED = result("fixed")
PSI = result(
    "psi", tokens_per_s=30.0, bytes_returned=57 * MIB, trims=3, first_trim_s=0.48, restored=True, stall=0.05
)


class TestChoice:
    FIGURES = {"model": "m.gguf"}  # noqa: RUF012

    def choose(self, monkeypatch, *, zram: bool, cgroup: bool, gentle: bool = False):
        answers = {"zram": (zram, "zram is missing: do this"), "none": (cgroup, "no right: run it as root")}
        monkeypatch.setattr(Sandbox, "available", staticmethod(lambda swap="none": answers[swap]))
        return demo.choose_scene(dict(self.FIGURES), gentle)

    def test_with_zram_it_is_the_whole_scene(self, monkeypatch):
        options, remark = self.choose(monkeypatch, zram=True, cgroup=True)
        assert (options.swap_bytes, options.gentle, options.pressure_bytes, remark) == (
            512 * MIB,
            False,
            250 * MIB,
            "",
        )

    def test_without_zram_the_neighbour_takes_less_and_slowly(self, monkeypatch):
        options, remark = self.choose(monkeypatch, zram=False, cgroup=True)
        assert (options.swap_bytes, options.gentle, options.pressure_bytes) == (0, False, 220 * MIB)
        assert "zram is missing: do this" in remark

    def test_without_a_cgroup_nothing_is_pressed_and_one_line_says_why(self, monkeypatch):
        options, remark = self.choose(monkeypatch, zram=False, cgroup=False)
        assert options.gentle
        assert "run it as root" in remark
        assert "\n" not in remark

    def test_gentle_is_gentle_whatever_there_is(self, monkeypatch):
        options, remark = self.choose(monkeypatch, zram=True, cgroup=True, gentle=True)
        assert (options.gentle, remark) == (True, "")


class TestWords:
    def test_both_columns_have_the_same_lines(self):
        assert list(figures(FIXED)) == list(figures(PSI))

    def test_the_figures_of_a_run(self):
        shown = figures(PSI)
        assert shown["tokens per second"] == "30.0"
        assert shown["p99 of a token"] == "234 ms"
        assert shown["bytes returned"] == "57.0 MiB"
        assert shown["restored"] == "yes, every cell"
        assert figures(FIXED)["restored"] == "nothing was given up"

    def test_a_killed_run_has_no_final_memory_and_says_when(self):
        killed = result("fixed", killed=True, tokens=0, p50_s=None, p99_s=None, stall=None)
        shown = figures(killed)
        assert shown["killed"] == "yes, after 0 tokens"
        assert (shown["final resident memory"], shown["p99 of a token"]) == ("-", "-")
        assert shown["time lost to stalls"] == "not known"
        assert "the ungoverned one was killed" in verdict(killed, PSI)
        assert figures(result("fixed", neighbour_killed=True))["killed"] == "no, but the neighbour was"

    @pytest.mark.parametrize(
        ("psi", "words"),
        [
            (PSI, "3.0 times as fast"),
            (
                result("psi", trims=1, restored=False, missing_cells=7, first_trim_s=1.0),
                "7 cells are missing",
            ),
            (result("psi", killed=True), "was killed: give"),
            (result("psi"), "nothing was given up"),
            (result("psi", trims=1, restored=True, bytes_returned=9 * MIB), "returned 9 MiB"),
        ],
    )
    def test_the_verdict_says_what_happened(self, psi, words):
        assert words in verdict(FIXED, psi)


@pytest.mark.parametrize(
    "arguments", [["--tokens", "0"], ["--limit-mib", "-1"], ["--nonsense"], ["--ctx", "x"]]
)
def test_bad_options_end_with_status_2(arguments):
    outcome = CliRunner().invoke(demo.command, arguments)
    assert outcome.exit_code == 2


def test_a_missing_model_is_one_line_and_status_2(tmp_path):
    done = subprocess.run([*ARGV, "--model", str(tmp_path / "none.gguf")], capture_output=True, check=False)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(b"psi-kv: error:")


@pytest.mark.slow
@pytest.mark.llama
def test_a_gentle_demo_ends_with_both_results(wide_model):
    argv = [*ARGV, "--gentle", "--ctx", "500", "--tokens", "6", "--json", "--model", str(wide_model)]
    done = subprocess.run(argv, capture_output=True, check=True)
    fixed, psi = json.loads(done.stdout)["results"]
    assert (fixed["variant"], fixed["tokens"], fixed["bytes_returned"]) == ("fixed", 6, 0)
    assert (psi["variant"], psi["tokens"], psi["restored"], psi["missing_cells"]) == ("psi", 6, True, 0)
    assert psi["bytes_returned"] > MIB
    assert b"governed: gave up" in done.stderr


@pytest.mark.slow
@pytest.mark.llama
def test_on_a_terminal_it_is_shown_live_and_ends_with_the_table(wide_model):
    argv = [*ARGV, "--gentle", "--ctx", "96", "--tokens", "4", "--model", str(wide_model)]
    terminal, end = pty.openpty()
    process = subprocess.Popen(argv, stdin=end, stdout=end, stderr=end, env={**os.environ, "TERM": "xterm"})
    os.close(end)
    shown = b""
    try:
        while data := os.read(terminal, 1 << 16):
            shown += data
    except OSError:  # EIO: the other side is closed
        pass
    os.close(terminal)
    assert process.wait() == 0
    for words in ("ungoverned", "resident", "tokens per second", "bytes returned"):
        assert words.encode() in shown
    assert shown.rstrip().endswith(b".")


@pytest.mark.llama
@pytest.mark.swap
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_in_the_middle_it_cleans_up_and_ends_with_one_line(demo_model, number, status):
    process = subprocess.Popen(
        [*ARGV, "--model", str(demo_model)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    for line in process.stderr:
        if b"filling the context" in line:
            break
    sandboxes = sandboxes_of(process.pid)
    assert sandboxes
    devices = swap_devices_of(process.pid)
    assert devices
    process.send_signal(number)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == status
    assert output == b""
    last = errors.decode().strip().splitlines()[-1]
    assert last == ("psi-kv: interrupted" if number == signal.SIGINT else "psi-kv: error: terminated")
    assert "Traceback" not in errors.decode()
    assert not any(sandbox.exists() for sandbox in sandboxes)
    assert not still_swapped_to(devices)
