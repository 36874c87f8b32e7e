"""The neighbour: a process that takes memory, keeps using it, and counts its own work.

    python -m psi_kv_governor.sandbox.load --mib 250 --step-mib 25 --pause-s 0.02
    python -m psi_kv_governor.sandbox.load --kind ramp --mib 250 --rate-mib-s 50
    python -m psi_kv_governor.sandbox.load --kind files --mib 250 --folder /var/tmp

`memory` takes anonymous memory in steps and then touches it; `ramp` takes it smoothly at a set rate; `files`
reads files through the page cache over and over. Prints a JSON line when it begins, after each step, four
times a second while it works, and at its end. Ends on SIGTERM or SIGINT, or when its parent is gone.
Standard library only: in a small cgroup its own interpreter counts.
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
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import BinaryIO, NoReturn

KINDS = ("memory", "files", "ramp")

_MIB = 1 << 20
_SLICE_BYTES = _MIB
"""Used between two looks at the clock and the parent: with every page in swap, this takes 0.1 s."""
_REPORT_S = 0.25
"""What was done while a token was decoded is read between two reports."""
_RAMP_SLICE_S = 0.005
_RAMP_LAG_S = 0.05
"""A ramp that was held up catches up on this much, and no more: the rest would come as a step."""
_SYNC_BYTES = 16 * _MIB
"""Files are made in parts of this: what waits to be written is memory that counts as taken."""


class _Ended(Exception):
    """SIGTERM or SIGINT came, or nobody listens any more."""


def fill(region: mmap.mmap, start: int, stop: int, block: bytes) -> None:
    """Write `block` over and over. zram compresses page by page, so a random page stays as big as it is."""
    for offset in range(start, stop, len(block)):
        part = min(len(block), stop - offset)
        region[offset : offset + part] = block[:part]


def touch(view: memoryview, start: int, stop: int, value: int) -> None:
    """Write one byte in every page from `start` to `stop`."""
    pages = len(range(start, stop, mmap.PAGESIZE))
    view[start : stop : mmap.PAGESIZE] = bytes([value & 0xFF]) * pages


def slices(start: int, stop: int, n_bytes: int = _SLICE_BYTES) -> Iterator[tuple[int, int]]:
    """From `start` to `stop` in parts of `n_bytes`, the last one shorter."""
    for begin in range(start, stop, n_bytes):
        yield begin, min(begin + n_bytes, stop)


class Reporter:
    """Counts the work, says how it goes, and looks whether it is to go on."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._began_s = self._said_s = time.monotonic()
        self.taken_bytes = 0
        self.work_bytes = 0

    def look(self) -> None:
        """Raises _Ended when the parent is gone."""
        if os.getppid() != self._parent:
            raise _Ended

    def did(self, n_bytes: int) -> None:
        """`n_bytes` more are done. Raises _Ended when the parent is gone."""
        self.work_bytes += n_bytes
        self.look()
        if time.monotonic() - self._said_s >= _REPORT_S:
            self.say("work")

    def say(self, event: str) -> None:
        """Print a line: `begin`, `taken` (a step is done), `work`, `end`.

        `time_s` is the machine's monotonic clock, `taken_bytes` what is held, or what files are read of;
        `work_bytes` is what was filled, touched (a byte a page counts as the page) or read so far.
        """
        self._said_s = time.monotonic()
        line = {
            "event": event,
            "time_s": self._said_s,
            "elapsed_s": self._said_s - self._began_s,
            "taken_bytes": self.taken_bytes,
            "work_bytes": self.work_bytes,
        }
        try:
            # In one piece: a signal may come while it is written, and nothing is to be glued to half a line.
            os.write(sys.stdout.fileno(), json.dumps(line).encode() + b"\n")
        except BrokenPipeError:
            raise _Ended from None


class Pace:
    """Lets `n_bytes` at a time pass, at `rate` bytes a second; 0 is as fast as it can."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._due_s = time.monotonic()
        pages = int(rate * _RAMP_SLICE_S) // mmap.PAGESIZE
        self.slice_bytes = min(_SLICE_BYTES, max(1, pages) * mmap.PAGESIZE) if rate else _SLICE_BYTES

    def wait(self, n_bytes: int) -> None:
        """Until the next `n_bytes` are due."""
        if not self._rate:
            return
        now_s = time.monotonic()
        self._due_s = max(self._due_s + n_bytes / self._rate, now_s - _RAMP_LAG_S)
        time.sleep(max(0.0, self._due_s - now_s))


class Memory:
    """Takes `n_bytes`, in steps or at a rate, and then touches every page of it again and again."""

    def __init__(self, options: argparse.Namespace, reporter: Reporter) -> None:
        self._n_bytes = options.mib * _MIB
        self._options, self._reporter = options, reporter
        self._block = random.Random(options.seed).randbytes(_SLICE_BYTES)

    def run(self) -> NoReturn:
        """Until _Ended."""
        self._reporter.say("begin")
        with mmap.mmap(-1, self._n_bytes) as region:
            if self._options.kind == "ramp":
                self._take_smoothly(region)
            else:
                self._take_in_steps(region)
            self._work(region)

    def _take_in_steps(self, region: mmap.mmap) -> None:
        for start, stop in slices(0, self._n_bytes, self._options.step_mib * _MIB):
            for begin, end in slices(start, stop):
                self._take(region, begin, end)
            self._reporter.say("taken")
            time.sleep(self._options.pause_s)

    def _take_smoothly(self, region: mmap.mmap) -> None:
        pace = Pace(self._options.rate_mib_s * _MIB)
        for start, stop in slices(0, self._n_bytes, pace.slice_bytes):
            pace.wait(stop - start)
            self._take(region, start, stop)
        self._reporter.say("taken")

    def _take(self, region: mmap.mmap, start: int, stop: int) -> None:
        fill(region, start, stop, self._block)
        self._reporter.taken_bytes = stop
        self._reporter.did(stop - start)

    def _work(self, region: mmap.mmap) -> NoReturn:
        round_number = 0
        with memoryview(region) as view:
            while True:
                round_number += 1
                for start, stop in slices(0, self._n_bytes):
                    touch(view, start, stop, round_number)
                    self._reporter.did(stop - start)


class Files:
    """Makes files of `step_mib` each, `mib` in all, and reads them from first to last, again and again.

    They have no name from birth (O_TMPFILE, or unlinked at once), so nothing of them is left however this
    ends. They are on the disk and out of the page cache before it begins: what is then read is charged to
    whoever reads it.
    """

    def __init__(self, options: argparse.Namespace, reporter: Reporter) -> None:
        self._options, self._reporter = options, reporter
        self._buffer = bytearray(_SLICE_BYTES)

    def run(self) -> NoReturn:
        """Until _Ended."""
        sizes = [stop - start for start, stop in slices(0, self._options.mib, self._options.step_mib)]
        with ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile(dir=self._options.folder)) for _ in sizes]
            for file, size in zip(files, sizes, strict=True):
                self._make(file, size * _MIB)
            self._reporter.say("begin")
            for file, size in zip(files, sizes, strict=True):
                self._read(file)
                self._reporter.taken_bytes += size * _MIB
                self._reporter.say("taken")
            while True:
                for file in files:
                    self._read(file)

    def _make(self, file: BinaryIO, n_bytes: int) -> None:
        block = random.Random(self._options.seed).randbytes(_SLICE_BYTES)
        for begin, end in slices(0, n_bytes, _SYNC_BYTES):
            for start, stop in slices(begin, end):
                file.write(block[: stop - start])
                self._reporter.look()
            file.flush()
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)

    def _read(self, file: BinaryIO) -> None:
        offset = 0
        while count := os.preadv(file.fileno(), [self._buffer], offset):
            offset += count
            self._reporter.did(count)


def _end(_number: int, _frame: object) -> None:
    raise _Ended


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the process. Nonsense ends it with status 2."""
    parser = argparse.ArgumentParser(
        prog="psi_kv_governor.sandbox.load", description="Takes and uses memory."
    )
    parser.add_argument("--kind", choices=KINDS, default="memory", help="what is taken, and how")
    parser.add_argument("--mib", type=int, required=True, help="how much to take, or to read")
    parser.add_argument("--step-mib", type=int, default=25, help="memory, files: how much at a time")
    parser.add_argument("--pause-s", type=float, default=0.02, help="memory: pause between two steps")
    parser.add_argument("--rate-mib-s", type=float, default=0.0, help="ramp: 0 is as fast as it can")
    parser.add_argument("--folder", help="files: where to make them")
    parser.add_argument("--seed", type=int, default=1, help="of the content")
    options = parser.parse_args(arguments)
    if options.mib < 1 or options.step_mib < 1 or not 0.0 <= options.pause_s < 3600.0:
        parser.error("give --mib and --step-mib of 1 or more, and --pause-s from 0")
    if not 0.0 <= options.rate_mib_s < float("inf"):
        parser.error("give --rate-mib-s from 0")
    if options.kind == "files" and not options.folder:
        parser.error("--kind files needs --folder")
    return options


def main() -> int:
    """Entry point of the process."""
    options = parse()
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    reporter = Reporter()
    neighbour = Files(options, reporter) if options.kind == "files" else Memory(options, reporter)
    with contextlib.suppress(_Ended):  # a second signal may come while it says so
        try:
            neighbour.run()
        except _Ended:
            reporter.say("end")
        except OSError as error:
            print(f"cannot use {error.filename or options.folder}: {error.strerror}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
