"""The neighbour takes what it says, keeps touching it, and ends when it should."""

from __future__ import annotations

import argparse
import json
import mmap
import signal
import subprocess
import sys
import time
import zlib
from functools import partial

import pytest

from psi_kv_governor.sandbox import load
from psi_kv_governor.sandbox.process_memory import glance
from sandbox_help import started

MIB = 1 << 20


start = partial(started, load)


def test_it_takes_memory_in_steps_and_ends_on_sigterm():
    process = start("--mib", "30", "--step-mib", "10", "--pause-s", "0")
    lines = [json.loads(process.stdout.readline()) for _ in range(4)]
    assert [line["event"] for line in lines] == ["begin", "taken", "taken", "taken"]
    assert lines[0]["time_s"] <= lines[-1]["time_s"] <= time.monotonic()
    memory = glance(process.pid)
    assert 30 * MIB <= memory.resident_bytes < 60 * MIB
    process.terminate()
    output, errors = process.communicate(timeout=600)
    assert (process.returncode, output, errors) == (-signal.SIGTERM, b"", b"")


def test_it_ends_when_its_parent_is_gone():
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-m', {load.__name__!r}, '--mib', '4'])\n"
        "time.sleep(300)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert json.loads(parent.stdout.readline())["event"] == "begin"
    parent.send_signal(signal.SIGKILL)
    began_s = time.monotonic()
    parent.stdout.read()  # ends when the last holder of the pipe, the child, has ended
    assert time.monotonic() - began_s < 200.0  # of the 300 that its parent would have slept
    parent.wait()
    parent.stdout.close()


@pytest.mark.parametrize(
    "arguments",
    [[], ["--mib", "x"], ["--nonsense"]],
)
def test_nonsense_is_refused_with_one_line_and_status_2(arguments):
    process = start(*arguments)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 2
    assert b"Traceback" not in errors


class Stopped(Exception):
    """So much was done."""


class Limited(load.Memory):
    """Stops after so many parts."""

    parts = 1

    def did(self, n_bytes: int) -> None:
        self.parts -= 1
        if self.parts < 0:
            raise Stopped


def test_what_it_takes_does_not_compress():
    with mmap.mmap(-1, MIB) as region:
        Limited(argparse.Namespace(mib=1)).take(region, 0, MIB)
        for offset in range(0, MIB, mmap.PAGESIZE):
            assert len(zlib.compress(region[offset : offset + mmap.PAGESIZE])) > 0.95 * mmap.PAGESIZE


def test_it_writes_a_byte_of_each_page_again_and_again():
    neighbour = Limited(argparse.Namespace(mib=2))
    with mmap.mmap(-1, 2 * MIB) as region:
        neighbour.parts = 2 * 7
        with pytest.raises(Stopped):
            neighbour.work(region)
        # A part is written before it is counted: the first part is in its eighth round.
        assert set(region[0 : MIB : mmap.PAGESIZE]) == {8}
        assert set(region[MIB :: mmap.PAGESIZE]) == {7}
        assert not any(region[1 :: mmap.PAGESIZE])
