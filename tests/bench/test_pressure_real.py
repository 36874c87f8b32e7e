"""The pressure benchmark with the real model under real pressure, and what is left of it however it ends."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.sandbox.load import MIB
from psikv_bench import host
from psikv_bench.messages import Progress, Setup
from psikv_bench.pressure.scene import SceneOptions, outside_bytes, run_scene
from psikv_bench.pressure.setting import _DECODE_MAX_S, size_of
from sandbox_help import pids_in, sandboxes_of, still_swapped_to, swap_devices_of
from waiting import until

SCRIPT = Path(__file__).parents[2] / "benchmarks/pressure_bench.py"
SMALL = [
    *("-c", "1024", "--prompt-tokens", "448", "-n", "24", "--variant-cooldown-s", "0"),
    *("--pressure-mib", "100", "--memory-limit-mib", "230"),
]
"""A cache of 22 MiB, all of it resident with plain llama.cpp."""
LONG = ["-c", "4096", "--prompt-tokens", "352", "-n", "3000", "--pressure-mib", "150", "--variants", "fixed"]
"""A pressed time of minutes."""


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], end_of_line: str) -> None:
    """Until a line of its progress ends so."""
    said = []
    for line in process.stderr:
        said.append(line)
        if line.rstrip().endswith(end_of_line):
            return
    pytest.fail("it ended too soon: " + "".join(said))


def running(pids: set[int]) -> set[int]:
    """Those that are there and are no zombies that their new parent has not yet collected."""
    found = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            found.add(pid)
    return found


@pytest.mark.slow
@pytest.mark.llama
@pytest.mark.swap
def test_three_variants_under_pressure_give_a_whole_report(demo_model, tmp_path):
    folder = tmp_path / "report"
    process = start(*SMALL, "--model", str(demo_model), "--repeats", "1", "--out-dir", str(folder), "--json")
    output, errors = process.communicate(timeout=800)
    assert process.returncode in {0, 1}, errors  # so small a scene may miss what is asked
    assert "Traceback" not in errors
    result = json.loads(output)
    assert result["interrupted"] is False
    found = {run["result"]["variant"]: run["result"] for run in result["rows"]}
    assert list(found) == ["fixed", "reference", "psi"]
    for run in found.values():
        # All of them, or it is cut off where it has come to a stand.
        assert run["tokens"] == 24 or run["killed"] or run["seconds"] > _DECODE_MAX_S
        assert run["neighbour_bytes_per_s"] > 0
        assert run["peak_resident_bytes"] > 100 * MIB
        assert 0.0 <= run["stall"] <= 1.0
    assert found["fixed"]["bytes_returned"] == found["fixed"]["trims"] == 0
    assert found["reference"]["bytes_returned"] < MIB
    assert found["psi"]["missing_cells"] == 0
    rows = list(csv.DictReader((folder / "pressure.csv").open()))
    assert {row["variant"] for row in rows} == set(found)
    assert all(int(row["resident_bytes"]) > 0 for row in rows)
    assert (folder / "timeline.png").stat().st_size > 10_000


@pytest.mark.llama
@pytest.mark.cgroup
def test_the_reference_removes_the_middle_decodes_on_and_returns_nothing(demo_model, monkeypatch, tmp_path):
    # Its own file instead of the machine's, so that it sees pressure whatever this machine does.
    psi = tmp_path / "memory.pressure"
    psi.write_text("some avg10=50.00 avg60=0.00 avg300=0.00 total=1\n")
    monkeypatch.setattr(host, "MACHINE_PRESSURE", psi)
    setup = Setup(
        variant="fixed", model=str(demo_model), context_tokens=448, context_cells=1024, keep=16, tail=64
    )
    found = run_scene("reference", SceneOptions(setup=setup, tokens=12))
    assert found.tokens == 12
    assert found.trims == 1
    assert found.missing_cells == pytest.approx(448 + 16 - 64 - 16, abs=1)
    assert found.final_cells == 448 + 16 + 12 - found.missing_cells
    assert found.restored is False
    assert found.bytes_returned < MIB
    assert found.neighbour_bytes_per_s is None


@pytest.mark.llama
@pytest.mark.cgroup
def test_a_neighbour_that_reads_files_or_ramps_is_counted_too(demo_model, tmp_path):
    for load in ("files", "ramp"):
        options = SceneOptions(
            setup=Setup(variant="fixed", model=str(demo_model), context_tokens=96, context_cells=512),
            tokens=8,
            pressure_bytes=50 * MIB,
            neighbour=tuple(host.neighbour(load, 50 * MIB, rate_mib_s=50, folder=str(tmp_path))),
            warmup_s=0.5,
            limit_bytes=600 * MIB,
        )
        stages = []
        found = run_scene("fixed", options, stages.append)
        assert found.tokens == 8
        assert found.decoding_from_s >= 0.5
        assert found.neighbour_bytes_per_s > 0
        assert any(isinstance(event, Progress) and event.stage == "pressed" for event in stages)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.llama
def test_outside_a_sandbox_the_neighbour_gets_no_more_than_a_quarter_of_what_is_available(
    tmp_path, demo_model
):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8000 kB\nMemAvailable: 4000 kB\n")
    assert outside_bytes(tmp_path) == 1000 * 1024
    assert outside_bytes(tmp_path / "nowhere") == 0
    too_much = SceneOptions(  # a quarter of no machine: what is available changes from look to look
        setup=Setup(variant="fixed", model=str(demo_model)), tokens=8, pressure_bytes=1 << 50
    )
    with pytest.raises(BadInputError, match="a quarter of what is available"):
        run_scene("fixed", too_much)


@pytest.mark.llama
def test_the_size_of_a_model_is_its_process_with_the_whole_cache(shallow_model):
    small, large = (size_of(shallow_model, cells, 1) for cells in (512, 16_384))
    assert large.weights_bytes == shallow_model.stat().st_size
    assert small.cell_bytes == large.cell_bytes == pytest.approx(4_608, rel=0.01)
    assert large.resident_bytes - small.resident_bytes == pytest.approx((16_384 - 512) * 4_608, rel=0.25)
    with pytest.raises(PsiKvError, match="can't be run with 512 cells"):
        size_of(Path(__file__), 512, 1)


@pytest.mark.slow
@pytest.mark.llama
@pytest.mark.swap
def test_interrupted_it_keeps_the_runs_it_finished_and_cleans_up(demo_model, tmp_path):
    folder = tmp_path / "report"
    process = start(
        *SMALL, "--model", str(demo_model), "--variants", "fixed", "--repeats", "3", "--out-dir", str(folder),
        "--json",
    )  # fmt: skip
    wait_for(process, "run 2 of 3: fixed")
    wait_for(process, "fixed: filling the context")
    sandboxes, devices = sandboxes_of(process.pid), swap_devices_of(process.pid)
    pids = pids_in(sandboxes)
    assert sandboxes
    assert devices
    assert pids
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=600)  # the plots are still to be drawn
    assert process.returncode == 130
    assert json.loads(output)["interrupted"] is True
    assert errors.splitlines()[-1] == "psi-kv: interrupted"
    assert "kept in" in errors
    kept = json.loads((folder / "result.json").read_text())
    assert (kept["interrupted"], len(kept["rows"])) == (True, 1)
    assert (folder / "timeline.png").exists()
    assert not running(pids)
    assert not any(pen.exists() for pen in sandboxes)
    assert not still_swapped_to(devices)


@pytest.mark.slow
@pytest.mark.llama
@pytest.mark.swap
@pytest.mark.parametrize("load", ["memory", "files"])
def test_nothing_outlives_a_benchmark_that_is_killed_under_pressure(demo_model, tmp_path, load):
    folder = tmp_path / "report"
    process = start(
        *LONG,
        "--model",
        str(demo_model),
        "--memory-limit-mib",
        "360",
        "--load",
        load,
        "--out-dir",
        str(folder),
    )
    wait_for(process, "fixed: decoding")
    sandboxes, devices = sandboxes_of(process.pid), swap_devices_of(process.pid)
    pids = pids_in(sandboxes)
    assert len(pids) == 2, "the model and its neighbour"
    assert devices
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=600)
    until(lambda: not running(pids), "the model and its neighbour run on")
    until(lambda: not any(pen.exists() for pen in sandboxes), f"left behind: {sandboxes}")
    until(lambda: not still_swapped_to(devices), f"left behind: {devices}")
    assert [path.name for path in folder.iterdir()] == ["journal.jsonl"]
