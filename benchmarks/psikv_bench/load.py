"""Neighbours that count their work: `psi_kv_governor.sandbox.load`, at a rate too, and one that reads files.

    python -m psikv_bench.load --kind ramp --mib 250 --rate-mib-s 50
    python -m psikv_bench.load --kind files --mib 250 --folder /var/tmp

Prints a JSON line four times a second while it works, too, and at its end.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from typing import BinaryIO, Literal, NoReturn, get_args

from psi_kv_governor.sandbox import load
from psi_kv_governor.sandbox.load import MIB, SLICE_BYTES, arguments, slices

LoadKind = Literal["memory", "files", "ramp"]
"""What the neighbour does."""

_REPORT_S = 0.25
"""What was done while a token was decoded is read between two reports."""
_RAMP_SLICE_S = 0.005
_RAMP_LAG_S = 0.05
"""A ramp that was held up catches up on this much, and no more: the rest would come as a step."""
_SYNC_BYTES = 16 * MIB
"""Files are made in parts of this: what waits to be written is memory that counts as taken."""


class Memory(load.Memory):
    """Counts what it does."""

    taken_bytes = 0
    """What is held, or what files are read of."""
    work_bytes = 0
    """What was filled, touched or read so far."""
    _said_s = 0.0

    def take(self, region: mmap.mmap, start: int, stop: int) -> None:
        self.taken_bytes = stop
        super().take(region, start, stop)

    def did(self, n_bytes: int) -> None:
        super().did(n_bytes)
        self.work_bytes += n_bytes
        if time.monotonic() - self._said_s >= _REPORT_S:
            self.say("work")

    def say(self, event: str, **more: int) -> None:
        self._said_s = time.monotonic()
        super().say(event, taken_bytes=self.taken_bytes, work_bytes=self.work_bytes, **more)


class Ramp(Memory):
    """Takes memory at a rate; 0 is as fast as it can."""

    def take_all(self, region: mmap.mmap) -> None:
        """Without catching up on much: see _RAMP_LAG_S."""
        rate = self.options.rate_mib_s * MIB
        pages = max(1, int(rate * _RAMP_SLICE_S) // mmap.PAGESIZE)
        slice_bytes = min(SLICE_BYTES, pages * mmap.PAGESIZE) if rate else SLICE_BYTES
        due_s = time.monotonic()
        for start, stop in slices(0, self.n_bytes, slice_bytes):
            if rate:
                now_s = time.monotonic()
                due_s = max(due_s + (stop - start) / rate, now_s - _RAMP_LAG_S)
                time.sleep(max(0.0, due_s - now_s))
            self.take(region, start, stop)
        self.say("taken")


class Files(Memory):
    """Makes files of `step_mib` each, `mib` in all, and reads them from first to last, again and again.

    They have no name from birth (O_TMPFILE, or unlinked at once), so nothing of them is left however this
    ends. They are on the disk and out of the page cache before it begins: what is then read is charged to
    whoever reads it.
    """

    def run(self) -> NoReturn:
        """For ever."""
        self._buffer = bytearray(SLICE_BYTES)
        sizes = [stop - start for start, stop in slices(0, self.options.mib, self.options.step_mib)]
        with ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile(dir=self.options.folder)) for _ in sizes]
            for file, size in zip(files, sizes, strict=True):
                self._make(file, size * MIB)
            self.say("begin")
            for file, size in zip(files, sizes, strict=True):
                self._read(file)
                self.taken_bytes += size * MIB
                self.say("taken")
            while True:
                for file in files:
                    self._read(file)

    def _make(self, file: BinaryIO, n_bytes: int) -> None:
        block = random.Random(self.options.seed).randbytes(SLICE_BYTES)
        for begin, end in slices(0, n_bytes, _SYNC_BYTES):
            for start, stop in slices(begin, end):
                file.write(block[: stop - start])
            file.flush()
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)

    def _read(self, file: BinaryIO) -> None:
        offset = 0
        while count := os.preadv(file.fileno(), [self._buffer], offset):
            offset += count
            self.did(count)


_KINDS: dict[LoadKind, type[Memory]] = {"memory": Memory, "ramp": Ramp, "files": Files}


def _end(_number: int, _frame: object) -> None:
    sys.exit()


def main() -> int:
    """Entry point of the process."""
    parser = arguments()
    parser.add_argument("--kind", choices=get_args(LoadKind), default="memory", help="what is taken, and how")
    parser.add_argument("--rate-mib-s", type=float, default=0.0, help="ramp: 0 is as fast as it can")
    parser.add_argument("--folder", help="files: where to make them")
    parser.add_argument("--seed", type=int, default=1, help="of the content")
    options = parser.parse_args()
    if options.kind == "files" and not options.folder:
        parser.error("--kind files needs --folder")
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    neighbour = _KINDS[options.kind](options, options.seed)
    try:
        neighbour.run()
    except SystemExit:
        with contextlib.suppress(SystemExit, BrokenPipeError):  # a second signal may come while it says so
            neighbour.say("end")
    except BrokenPipeError:
        return 0
    except OSError as error:
        print(f"cannot use {error.filename or options.folder}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
