"""The neighbour: a process that takes memory in steps and keeps touching it.

    python -m psi_kv_governor.sandbox.load --mib 250 --step-mib 25 --pause-s 0.02

Prints a JSON line when it begins and after each step. Ends on a signal, or when its parent is gone. Standard
library only: in a small cgroup its own interpreter counts.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

MIB = 1 << 20
SLICE_BYTES = MIB
"""Taken or touched between two looks at the parent: with every page in swap, this takes 0.1 s."""


def slices(start: int, stop: int, n_bytes: int = SLICE_BYTES) -> Iterator[tuple[int, int]]:
    """From `start` to `stop` in parts of `n_bytes`, the last one shorter."""
    for begin in range(start, stop, n_bytes):
        yield begin, min(begin + n_bytes, stop)


class Memory:
    """Takes memory, in steps, and then touches every page of it again and again."""

    def __init__(self, options: argparse.Namespace, seed: int = 1) -> None:
        self.options, self.n_bytes = options, options.mib * MIB
        self._parent = os.getppid()
        # zram compresses page by page, so that random pages stay as big as they are.
        self._block = random.Random(seed).randbytes(SLICE_BYTES)

    def run(self) -> NoReturn:
        """For ever."""
        self.say("begin")
        with mmap.mmap(-1, self.n_bytes) as region:
            self.take_all(region)
            self.work(region)

    def take_all(self, region: mmap.mmap) -> None:
        """In steps."""
        for start, stop in slices(0, self.n_bytes, self.options.step_mib * MIB):
            for begin, end in slices(start, stop):
                self.take(region, begin, end)
            self.say("taken")
            time.sleep(self.options.pause_s)

    def take(self, region: mmap.mmap, start: int, stop: int) -> None:
        """A part."""
        region[start:stop] = self._block[: stop - start]
        self.did(stop - start)

    def work(self, region: mmap.mmap) -> NoReturn:
        """A byte in every page, round after round."""
        round_number = 0
        with memoryview(region) as view:
            while True:
                round_number += 1
                for start, stop in slices(0, self.n_bytes):
                    pages = len(range(start, stop, mmap.PAGESIZE))
                    view[start : stop : mmap.PAGESIZE] = bytes([round_number & 0xFF]) * pages
                    self.did(stop - start)

    def did(self, n_bytes: int) -> None:
        """`n_bytes` more were filled or touched (a byte a page counts as the page)."""
        del n_bytes
        if os.getppid() != self._parent:
            sys.exit()

    def say(self, event: str, **more: int) -> None:
        """Print a line: `begin`, `taken` (a step is done); `time_s` is the machine's monotonic clock."""
        line = json.dumps({"event": event, "time_s": time.monotonic(), **more})
        os.write(sys.stdout.fileno(), line.encode() + b"\n")  # in one piece, whenever it is ended


def arguments() -> argparse.ArgumentParser:
    """The options of the process."""
    parser = argparse.ArgumentParser(description="Takes and uses memory.")
    parser.add_argument("--mib", type=int, required=True, help="how much to take")
    parser.add_argument("--step-mib", type=int, default=25, help="how much at a time")
    parser.add_argument("--pause-s", type=float, default=0.02, help="pause between two steps")
    return parser


if __name__ == "__main__":
    Memory(arguments().parse_args()).run()
