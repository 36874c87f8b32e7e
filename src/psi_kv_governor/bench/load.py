"""The neighbour: a process that takes memory in steps and keeps touching it.

    python -m psi_kv_governor.bench.load --mib 250 --step-mib 25 --pause-s 0.02

Prints a JSON line when it begins, after each step, about once a second while it works, and at its end.
Ends on SIGTERM or SIGINT, or when its parent is gone. Standard library only: in a small cgroup its own
interpreter counts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import signal
import sys
import time
from collections.abc import Iterator

_MIB = 1 << 20
_SLICE_BYTES = _MIB
"""Touched between two looks at the clock and the parent: with every page in swap, this takes 0.1 s."""
_REPORT_S = 1.0


class _Ended(Exception):
    """SIGTERM or SIGINT came."""


def fill(region: mmap.mmap, start: int, stop: int, block: bytes) -> None:
    """Write `block` over and over. zram compresses page by page, so a random page stays as big as it is."""
    for offset in range(start, stop, len(block)):
        part = min(len(block), stop - offset)
        region[offset : offset + part] = block[:part]


def touch(view: memoryview, start: int, stop: int, value: int) -> None:
    """Write one byte in every page from `start` to `stop`."""
    pages = len(range(start, stop, mmap.PAGESIZE))
    view[start : stop : mmap.PAGESIZE] = bytes([value & 0xFF]) * pages


def _slices(n_bytes: int) -> Iterator[tuple[int, int]]:
    for start in range(0, n_bytes, _SLICE_BYTES):
        yield start, min(start + _SLICE_BYTES, n_bytes)


class Neighbour:
    """Takes `n_bytes` in steps of `step_bytes`, `pause_s` apart, then works on it until it is told to end."""

    def __init__(self, n_bytes: int, step_bytes: int, pause_s: float, seed: int) -> None:
        self._n_bytes, self._step_bytes, self._pause_s = n_bytes, step_bytes, pause_s
        self._block = random.Random(seed).randbytes(_SLICE_BYTES)
        self._parent = os.getppid()
        self._began_s = time.monotonic()
        self._touched = 0
        self._taken = 0

    def run(self) -> None:
        """Until SIGTERM, SIGINT, or the end of the parent."""
        self._say("begin")
        with mmap.mmap(-1, self._n_bytes) as region:
            try:
                self._take(region)
                self._work(region)
            except _Ended:
                self._say("end")

    def _take(self, region: mmap.mmap) -> None:
        while self._taken < self._n_bytes:
            stop = min(self._taken + self._step_bytes, self._n_bytes)
            for start, end in _slices(stop - self._taken):
                fill(region, self._taken + start, self._taken + end, self._block)
                self._look()
            self._taken = stop
            self._say("taken")
            time.sleep(self._pause_s)

    def _work(self, region: mmap.mmap) -> None:
        said_s = time.monotonic()
        round_number = 0
        with memoryview(region) as view:
            while True:
                round_number += 1
                for start, stop in _slices(self._n_bytes):
                    touch(view, start, stop, round_number)
                    self._touched += stop - start
                    self._look()
                    if time.monotonic() - said_s >= _REPORT_S:
                        said_s = time.monotonic()
                        self._say("work")

    def _look(self) -> None:
        if os.getppid() != self._parent:
            raise _Ended

    def _say(self, event: str) -> None:
        elapsed_s = time.monotonic() - self._began_s
        line = {
            "event": event,
            "elapsed_s": elapsed_s,
            "taken_bytes": self._taken,
            "touched_bytes": self._touched,
        }
        try:
            print(json.dumps(line), flush=True)
        except BrokenPipeError:  # nobody listens any more
            raise _Ended from None


def _end(_number: int, _frame: object) -> None:
    raise _Ended


def main() -> int:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(
        prog="psi_kv_governor.bench.load", description="Takes and touches memory."
    )
    parser.add_argument("--mib", type=int, required=True, help="how much to take")
    parser.add_argument("--step-mib", type=int, default=25, help="how much at a time")
    parser.add_argument("--pause-s", type=float, default=0.02, help="pause between two steps")
    parser.add_argument("--seed", type=int, default=1, help="of the content")
    options = parser.parse_args()
    if options.mib < 1 or options.step_mib < 1 or not 0.0 <= options.pause_s < 3600.0:
        parser.error("give --mib and --step-mib of 1 or more, and --pause-s from 0")
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    with contextlib.suppress(_Ended):
        Neighbour(options.mib * _MIB, options.step_mib * _MIB, options.pause_s, options.seed).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
