"""The trials with the real model in real cgroups, tiny, and that nothing of them stays behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from psi_kv_governor.errors import BadInputError, PsiKvError
from psikv_bench.record import Recorder, say_nothing
from psikv_bench.scenes import capacity, latency, oom
from psikv_bench.scenes.capacity import CapacityOptions
from psikv_bench.scenes.latency import LatencyOptions
from psikv_bench.scenes.oom import OomOptions
from sandbox_help import leftovers, pids_in, sandboxes_of

MIB = 1 << 20


def ran(scene, model, options, folder=None, say=say_nothing, *, resume=False):
    options = msgspec.structs.replace(options, model=str(model))
    return scene.SCENE.run(
        Recorder(scene.__name__.rpartition(".")[2], options, folder=folder, resume=resume, say=say)
    )


pytestmark = [pytest.mark.llama, pytest.mark.cgroup, pytest.mark.slow]

OOM = OomOptions(ctx=640, runs=2, rates=(50.0, 100.0, 200.0), hold_s=0.5, mmap=False)
GENTLE = OomOptions(ctx=256, runs=2, rates=(0.0,), hold_s=0.2, limit_mib=400, load_mib=20)
LATENCY = LatencyOptions(
    ctx=640, onsets=1, control=0, modes=("decode",), rate=0.0, hold_s=0.5, hold_max_s=60.0
)
"""It is held until bytes are back, a second as a rule."""


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    assert leftovers() == []


def test_a_fixed_cache_is_killed_and_a_governed_one_is_not_in_ten_runs(wide_model, tmp_path):
    said: list[str] = []
    begun = ran(oom, wide_model, OOM, tmp_path, lambda doing, **_: said.append(doing))
    assert sum(row["killed"]["trials"] for row in begun.rows) == 2
    assert any("decoding the context once" in word for word in said)
    lines = (tmp_path / "journal.jsonl").read_bytes()
    ten = msgspec.structs.replace(OOM, runs=10)
    report = ran(oom, wide_model, ten, tmp_path, resume=True)
    assert not report.interrupted
    assert (tmp_path / "journal.jsonl").read_bytes().startswith(lines)  # what was finished is not run again
    fixed, governed = ([row for row in report.rows if row["variant"] == which] for which in ("fixed", "psi"))
    assert [sum(row["killed"]["trials"] for row in of) for of in (fixed, governed)] == [5, 5]
    assert sum(row["model_killed"] for row in fixed) >= 4
    assert all(n_bytes == 0 for row in fixed for n_bytes in row["returned_bytes"])
    # The record has none; one is let pass: a shared machine can itself stand still for a moment.
    assert sum(row["killed"]["hits"] for row in governed) <= 1
    assert all(row["whole"] == row["survived"] for row in governed)
    lived = [row for row in governed if not row["killed"]["hits"]]
    # Not in each: born in a file, the cache can be taken by the kernel before the governor has looked.
    assert any(n_bytes > 5 * MIB for row in lived for n_bytes in row["returned_bytes"])
    assert (tmp_path / "kills.png").exists()
    lines = (tmp_path / "journal.jsonl").read_bytes()
    again = ran(oom, wide_model, ten, tmp_path, resume=True)
    assert (tmp_path / "journal.jsonl").read_bytes() == lines
    assert again.rows == report.rows
    with pytest.raises(BadInputError, match="other options"):
        ran(oom, wide_model, OomOptions(), tmp_path, resume=True)


def test_an_interrupted_run_reports_what_is_finished(wide_model, tmp_path):
    def say(doing: str, **_: object) -> None:
        if doing.startswith("run 2"):
            raise KeyboardInterrupt

    report = ran(oom, wide_model, GENTLE, tmp_path, say)
    assert report.interrupted
    assert sum(row["killed"]["trials"] for row in report.rows) == 1
    assert "Interrupted" in (tmp_path / "summary.md").read_text()


def test_an_onset_is_answered_and_the_context_is_whole_again(wide_model, tmp_path):
    report = ran(latency, wide_model, LATENCY, tmp_path)
    (onset,) = report.rows
    assert not onset["killed"]
    assert onset["whole"]
    assert onset["returned_s"] is not None
    assert onset["returned_bytes"] > MIB
    assert 0.0 < onset["watch_share"] < 0.5


def test_a_limit_is_probed_until_the_longest_is_known(wide_model, tmp_path):
    options = CapacityOptions(limits=(400,), max_ctx=512, tokens=4, resolution=2.0, least_tokens_s=0.5)
    report = ran(capacity, wide_model, options, tmp_path)
    assert [(probe.variant, probe.length, probe.ending) for probe in report.rows] == [
        ("fixed", 512, "survived"),
        ("psi", 512, "survived"),
    ]
    assert all(probe.live_cells + probe.masked_cells + probe.lost_cells == 512 for probe in report.rows)
    assert all(probe.tokens_per_s > 0 for probe in report.rows)
    assert (tmp_path / "capacity.csv").read_text().count("\n") == 3


def test_a_context_that_does_not_fit_survives_in_no_variant(wide_model):
    options = CapacityOptions(limits=(32,), max_ctx=256, tokens=4)
    report = ran(capacity, wide_model, options)
    # Where no page is to be had it is killed; where mapped files still give some, it thrashes first.
    assert {probe.ending for probe in report.rows} <= {"killed", "slow"}
    assert report.figures == []


def test_a_model_that_does_not_fit_alone_says_so(wide_model):
    options = OomOptions(ctx=256, runs=1, limit_mib=64, load_mib=32, rates=(0.0,), mmap=False)
    with pytest.raises(PsiKvError, match="does not fit into 64 MiB"):
        ran(oom, wide_model, options)


def test_a_killed_benchmark_leaves_nothing(wide_model):
    argv = [sys.executable, "-m", "psi_kv_governor.cli", "bench", "oom", "--ctx", "256", "--limit-mib", "400"]
    argv += ["--load-mib", "20", "--rates", "10", "--hold-s", "60", "--model", str(wide_model)]
    process = subprocess.Popen(
        argv,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def wait_for(met) -> bool:
        deadline_s = time.monotonic() + 300.0  # a model is opened three times before the neighbour comes
        while not met() and time.monotonic() < deadline_s and process.poll() in {None, -signal.SIGKILL}:
            time.sleep(0.05)
        return bool(met())

    started: set[int] = set()

    def both_run() -> bool:
        found = pids_in(sandboxes_of(process.pid))
        started.update(found)
        return len(found) >= 2

    try:
        assert wait_for(both_run), "the model and its neighbour run in the sandbox"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert wait_for(lambda: not sandboxes_of(process.pid))
    assert wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))
