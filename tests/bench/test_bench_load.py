"""Neighbours that take memory at a rate, or read files."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from psikv_bench import load
from psikv_bench.process_memory import sample
from sandbox_help import started
from waiting import PATIENCE_S, until

MIB = 1 << 20


Line = dict[str, Any]

start = partial(started, load)


def said(process: subprocess.Popen[bytes], is_last: Callable[[Line], bool]) -> list[Line]:
    """Its lines to the first that `is_last`. Where the machine holds it up it says `work` between any two."""
    lines: list[Line] = []
    while not lines or not is_last(lines[-1]):
        lines.append(json.loads(process.stdout.readline()))
    return lines


def working(n_bytes: int) -> Callable[[Line], bool]:
    """Whether a line says that more than `n_bytes` were done, and all is taken."""
    return lambda line: line["event"] == "work" and line["work_bytes"] > n_bytes


def steps(lines: list[Line]) -> list[Line]:
    """Those that are said however long anything takes."""
    return [line for line in lines if line["event"] != "work"]


def test_what_is_taken_and_touched_is_counted_to_the_end():
    process = start("--mib", "30", "--step-mib", "10", "--pause-s", "0")
    lines = said(process, working(30 * MIB))
    taken = steps(lines)
    assert [line["event"] for line in taken] == ["begin", "taken", "taken", "taken"]
    assert [line["taken_bytes"] // MIB for line in taken] == [0, 10, 20, 30]
    assert [line["work_bytes"] for line in taken] == [line["taken_bytes"] for line in taken]
    assert lines[-1]["taken_bytes"] == 30 * MIB
    assert lines[0]["time_s"] <= lines[-1]["time_s"] <= time.monotonic()
    memory = sample(process.pid)
    assert 30 * MIB <= memory.resident_bytes < 60 * MIB
    assert rest_of(process)[-1]["event"] == "end"


def rest_of(process: subprocess.Popen[bytes]) -> list[Line]:
    process.terminate()
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (0, b"")
    return [json.loads(line) for line in output.splitlines()]


def test_a_ramp_takes_memory_at_its_rate_and_then_works_on_it():
    process = start("--kind", "ramp", "--mib", "40", "--rate-mib-s", "50")
    first, *ramp, taken = said(process, lambda line: line["event"] == "taken")
    assert first["event"] == "begin"
    assert ramp  # it takes 0.75 s at least, and says so four times a second
    for line in (*ramp, taken):
        assert line["taken_bytes"] == line["work_bytes"]  # nothing is touched before all is taken
        # At most the rate, with what may be caught up on; a busy machine may hold it up.
        assert 0 < line["taken_bytes"] / MIB < 50 * (line["time_s"] - first["time_s"] + 0.1)
    assert {line["event"] for line in ramp} == {"work"}
    assert taken["taken_bytes"] == 40 * MIB
    assert sample(process.pid).resident_bytes >= 40 * MIB
    done = said(process, working(40 * MIB))[-1]["work_bytes"]
    assert rest_of(process)[-1]["work_bytes"] >= done


def test_a_ramp_without_a_rate_is_as_fast_as_it_can():
    process = start("--kind", "ramp", "--mib", "40")
    begin, taken = steps(said(process, lambda line: line["event"] == "taken"))
    assert (begin["event"], taken["taken_bytes"]) == ("begin", 40 * MIB)
    assert taken["work_bytes"] == 40 * MIB
    rest_of(process)


def test_files_are_read_again_and_again_without_a_name_and_without_memory_of_its_own(tmp_path):
    process = start("--kind", "files", "--mib", "50", "--step-mib", "20", "--folder", str(tmp_path))
    lines = said(process, working(100 * MIB))
    read = steps(lines)
    assert [line["event"] for line in read] == ["begin", "taken", "taken", "taken"]
    assert [line["taken_bytes"] // MIB for line in read] == [0, 20, 40, 50]
    assert [line["work_bytes"] // MIB for line in read] == [0, 20, 40, 50]
    assert lines[-1]["taken_bytes"] == 50 * MIB
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
    process.communicate(timeout=PATIENCE_S)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_used_is_one_line_and_status_1(tmp_path):
    process = start("--kind", "files", "--mib", "1", "--folder", str(tmp_path / "none"))
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert errors.startswith(b"cannot use ")
    assert errors.count(b"\n") == 1


@pytest.mark.parametrize("arguments", [["--kind", "files"], ["--kind", "noise"]])
def test_what_makes_no_sense_is_refused_with_one_line_and_status_2(arguments):
    process = start("--mib", "4", *arguments)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    assert b"Traceback" not in errors
