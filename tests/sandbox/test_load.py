"""The neighbour takes what it says, keeps touching it, and ends when it should."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psi_kv_governor.sandbox import guardian, load
from psi_kv_governor.sandbox.process_memory import sample
from waiting import until

MIB = 1 << 20
ENV = {**os.environ, "PYTHONPATH": guardian.package_path()}


def start(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", load.__name__, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENV,
    )


def test_it_takes_memory_in_steps_touches_it_and_ends_on_sigterm():
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
        assert 0 < line["taken_bytes"] / MIB < 50 * (line["elapsed_s"] + 0.1)
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


def test_it_ends_when_its_parent_is_gone():
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-m', {load.__name__!r}, '--mib', '4'])\n"
        "time.sleep(300)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=ENV)
    assert json.loads(parent.stdout.readline())["event"] == "begin"
    parent.send_signal(signal.SIGKILL)
    began_s = time.monotonic()
    lines = parent.stdout.read().splitlines()  # ends when the last holder of the pipe, the child, has ended
    assert json.loads(lines[-1])["event"] == "end"
    assert time.monotonic() - began_s < 30.0
    parent.wait()
    parent.stdout.close()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--mib", "0"],
        ["--mib", "4", "--pause-s", "nan"],
        ["--mib", "4", "--kind", "ramp", "--rate-mib-s", "nan"],
        ["--mib", "4", "--kind", "ramp", "--rate-mib-s", "-1"],
        ["--mib", "4", "--kind", "files"],
        ["--mib", "4", "--kind", "noise"],
        [],
    ],
)
def test_nonsense_is_refused_with_one_line_and_status_2(arguments):
    process = start(*arguments)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 2
    assert b"Traceback" not in errors


def test_what_it_fills_does_not_compress():
    block = b"".join(os.urandom(1) for _ in range(8192))
    with mmap.mmap(-1, 64 * 1024) as region:
        load.fill(region, 4096, 64 * 1024, block)
        assert region[:4096] == bytes(4096)
        for offset in range(4096, 64 * 1024, 4096):
            assert len(zlib.compress(region[offset : offset + 4096])) > 4000


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 10**6))
def test_touch_writes_each_page_of_the_range_and_no_other(pages, first, value):
    with mmap.mmap(-1, 10 * mmap.PAGESIZE) as region, memoryview(region) as view:
        start = min(first, 9) * mmap.PAGESIZE
        stop = min(start + pages * mmap.PAGESIZE, len(region))
        load.fill(region, 0, len(region), b"\xff" * mmap.PAGESIZE)
        load.touch(view, start, stop, value)
        for offset in range(0, len(region), mmap.PAGESIZE):
            touched = start <= offset < stop
            assert region[offset] == (value & 0xFF if touched else 0xFF)
            assert region[offset + 1] == 0xFF
