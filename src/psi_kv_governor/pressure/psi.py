"""Pressure Stall Information: the parser, the file kept open, and shares from deltas of `total=`.

Format and meaning: kernel, Documentation/accounting/psi.rst.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import NamedTuple

from psi_kv_governor.errors import BadInputError, SourceLostError

# The two lines of a memory PSI file are at most 140 bytes with every number at its longest.
_READ_BYTES = 512
_LINE = re.compile(rb"(some|full) (?:avg\d+=\d{1,3}\.\d\d ){3}total=(\d{1,20})")
_LARGEST_TOTAL_US = 2**64 - 1  # the kernel counts in a u64

MIN_INTERVAL_S = 0.01
"""Shortest time that a share is computed over. Under it, one wait of a few ms would read as a full stall."""


class PsiTotals(NamedTuple):
    """The `total=` counters of a PSI file: microseconds of stall since the file came to be."""

    some_us: int
    full_us: int
    """0 where the file has no `full` line (the CPU files of kernels before 5.13)."""


def parse_psi(data: bytes) -> PsiTotals:
    """Read the counters out of the text of a PSI file. Raises BadInputError on anything else.

    A line counts only with its newline: a number that was cut short must not pass for a smaller one.
    """
    totals: dict[bytes, int] = {}
    if not data.endswith(b"\n"):
        raise BadInputError(f"not a PSI file: it ends in the middle of a line ({_excerpt(data)})")
    for line in data[:-1].split(b"\n"):
        match = _LINE.fullmatch(line)
        if match is None or match[1] in totals or int(match[2]) > _LARGEST_TOTAL_US:
            raise BadInputError(f"not a line of a PSI file: {_excerpt(line)}")
        totals[match[1]] = int(match[2])
    if b"some" not in totals:
        raise BadInputError("not a PSI file: it has no `some` line")
    return PsiTotals(totals[b"some"], totals.get(b"full", 0))


def _excerpt(data: bytes) -> str:
    return repr(data[:60].decode("ascii", "backslashreplace"))


class PsiFile:
    """A PSI file that stays open: a pread of the open file takes 3.5 us, and works without a new descriptor.

    Raises OSError on creation when the file cannot be opened or read: its errno says what is missing
    (ENOENT and EOPNOTSUPP: PSI is off). Raises BadInputError when it is no PSI file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        self._open()
        try:
            self._parse()
        except BaseException:
            self.close()
            raise

    def read(self) -> PsiTotals:
        """The counters now. Opens a lost file again once; raises SourceLostError when that fails."""
        try:
            return self._parse()
        except (OSError, BadInputError):
            # A removed cgroup answers ENODEV for good. The path may lead to a new one of the same name.
            self.close()
        try:
            self._open()
            return self._parse()
        except (OSError, BadInputError) as error:
            self.close()
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise SourceLostError(f"{self.path} no longer answers: {why}") from error

    def close(self) -> None:
        """Give the descriptor back. Safe to call twice; a later `read` opens the file again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> None:
        # O_NONBLOCK: a FIFO put in the place of the file must not stop the governor's thread for ever.
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def _parse(self) -> PsiTotals:
        if self._descriptor < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return parse_psi(os.pread(self._descriptor, _READ_BYTES, 0))


class Stall(NamedTuple):
    """Shares of wall time (0 to 1) lost to stalls over the last `interval_s`."""

    interval_s: float
    some: float
    full: float


_NOTHING_YET = Stall(0.0, 0.0, 0.0)


class StallMeter:
    """Turns counters into shares. Time comes in with them, so that a recording replays exactly.

    The first look has nothing to compare with and gives zeros. A look less than `MIN_INTERVAL_S` after
    the last one that counted is measured from the one before that: the share is of a longer time then,
    and as true.
    """

    def __init__(self) -> None:
        self._last: tuple[float, PsiTotals] | None = None
        self._earlier: tuple[float, PsiTotals] | None = None

    def add(self, time_s: float, totals: PsiTotals) -> Stall:
        """Take in the counters at `time_s` (monotonic) and give the shares since an earlier look."""
        if self._last is None or time_s - self._last[0] >= MIN_INTERVAL_S:
            self._earlier, self._last = self._last, (time_s, totals)
        if self._earlier is None:
            return _NOTHING_YET
        since_s, before = self._earlier
        interval_s = time_s - since_s
        return Stall(
            interval_s,
            _share(totals.some_us - before.some_us, interval_s),
            _share(totals.full_us - before.full_us, interval_s),
        )


def _share(stall_us: int, interval_s: float) -> float:
    """A counter that went backwards (the cgroup was made anew) counts as no stall."""
    return min(1.0, max(0, stall_us) / 1e6 / interval_s)
