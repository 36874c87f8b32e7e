"""Neighbours that take memory at a rate, or read files."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

from psikv_bench import load
from psikv_bench.process_memory import sample
from sandbox_help import started
from waiting import until

MIB = 1 << 20


start = partial(started, load)


def test_what_is_taken_and_touched_is_counted_to_the_end():
    process = start("--mib", "30", "--step-mib", "10", "--pause-s", "0")
    lines = [json.loads(process.stdout.readline()) for _ in range(5)]
    assert [line["event"] for line in lines] == ["begin", "taken", "taken", "taken", "work"]
    assert [line["taken_bytes"] // MIB for line in lines] == [0, 10, 20, 30, 30]
    assert [line["work_bytes"] for line in lines[:4]] == [line["taken_bytes"] for line in lines[:4]]
    assert lines[-1]["work_bytes"] > 30 * MIB
    assert lines[0]["time_s"] <= lines[-1]["time_s"] <= time.monotonic()
    memory = sample(process.pid)
    assert 30 * MIB <= memory.resident_bytes < 60 * MIB
    process.terminate()
    output, errors = process.communicate(timeout=10)
    assert json.loads(output.splitlines()[-1])["event"] == "end"
    assert (process.returncode, errors) == (0, b"")


def rest_of(process: subprocess.Popen[bytes]) -> list[dict[str, float]]:
    process.terminate()
    output, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (0, b"")
    return [json.loads(line) for line in output.splitlines()]


def test_a_ramp_takes_memory_at_its_rate_and_then_works_on_it():
    process = start("--kind", "ramp", "--mib", "40", "--rate-mib-s", "50")
    first, *ramp = [json.loads(process.stdout.readline()) for _ in range(5)]
    assert first["event"] == "begin"
    for line in ramp[:3]:
        assert line["event"] == "work"
        assert line["taken_bytes"] == line["work_bytes"]  # nothing is touched before all is taken
        # At most the rate, with what may be caught up on; a busy machine may hold it up.
        assert 0 < line["taken_bytes"] / MIB < 50 * (line["time_s"] - first["time_s"] + 0.1)
    assert (ramp[3]["event"], ramp[3]["taken_bytes"]) == ("taken", 40 * MIB)
    assert sample(process.pid).resident_bytes >= 40 * MIB
    line = ramp[3]
    while line["work_bytes"] <= 40 * MIB:  # it says so ten times a second
        line = json.loads(process.stdout.readline())
    assert rest_of(process)[-1]["work_bytes"] >= line["work_bytes"]


def test_a_ramp_without_a_rate_is_as_fast_as_it_can():
    process = start("--kind", "ramp", "--mib", "40")
    begin, taken = [json.loads(process.stdout.readline()) for _ in range(2)]
    while taken["event"] == "work":  # where it takes longer than a tenth of a second
        taken = json.loads(process.stdout.readline())
    assert (begin["event"], taken["event"], taken["taken_bytes"]) == ("begin", "taken", 40 * MIB)
    assert taken["work_bytes"] == 40 * MIB
    rest_of(process)


def test_files_are_read_again_and_again_without_a_name_and_without_memory_of_its_own(tmp_path):
    process = start("--kind", "files", "--mib", "50", "--step-mib", "20", "--folder", str(tmp_path))
    lines = [json.loads(process.stdout.readline()) for _ in range(5)]
    assert [line["event"] for line in lines] == ["begin", "taken", "taken", "taken", "work"]
    assert [line["taken_bytes"] // MIB for line in lines] == [0, 20, 40, 50, 50]
    assert [line["work_bytes"] // MIB for line in lines[:4]] == [0, 20, 40, 50]
    assert list(tmp_path.iterdir()) == []
    assert sample(process.pid).anonymous_bytes < 25 * MIB
    assert rest_of(process)[-1]["work_bytes"] > 100 * MIB
    assert list(tmp_path.iterdir()) == []


def bytes_being_made(pid: int, folder: Path) -> int:
    """Size of the files without a name that a process has open in `folder`."""
    made = 0
    with contextlib.suppress(FileNotFoundError):  # a descriptor that was closed between two looks
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if str(link.readlink()).startswith(str(folder)):
                made += link.stat().st_size
    return made


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_interrupted_while_it_makes_files_it_leaves_none(tmp_path, number):
    process = start("--kind", "files", "--mib", "2000", "--folder", str(tmp_path))
    until(lambda: bytes_being_made(process.pid, tmp_path) > MIB, "it made nothing")
    assert process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=10)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_used_is_one_line_and_status_1(tmp_path):
    process = start("--kind", "files", "--mib", "1", "--folder", str(tmp_path / "none"))
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 1
    assert errors.startswith(b"cannot use ")
    assert errors.count(b"\n") == 1


@pytest.mark.parametrize("arguments", [["--kind", "files"], ["--kind", "noise"]])
def test_what_makes_no_sense_is_refused_with_one_line_and_status_2(arguments):
    process = start("--mib", "4", *arguments)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 2
    assert b"Traceback" not in errors
