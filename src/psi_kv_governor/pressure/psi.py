"""Pressure Stall Information: the parser, the file kept open, and shares from deltas of `total=`.

Format and meaning: kernel, Documentation/accounting/psi.rst.
"""

from __future__ import annotations

import errno
import os
import re
from collections import deque
from pathlib import Path
from typing import NamedTuple

from psi_kv_governor.errors import BadInputError, SourceLostError
from psi_kv_governor.pressure.kernel_file import OPEN_FLAGS

# The two lines of a memory PSI file are at most 140 bytes with every number at its longest.
_READ_BYTES = 512
_LINE = re.compile(rb"(some|full) (?:avg\d+=\d{1,3}\.\d\d ){3}total=(\d{1,20})")
_LARGEST_TOTAL_US = 2**64 - 1  # the kernel counts in a u64

WINDOW_S = 0.1
"""Shortest time that a share is computed over. Under it, one wait of a few ms would read as a full stall, and
the totals get coarse: the kernel accounts a stall that still lasts at its own ticks."""

MIN_INTERVAL_S = 0.005
"""Looks that follow the last one sooner are used and not kept."""

STALE_S = 10.0
"""After so long without a look what the counters gained is no news: twenty times the calm loop's pause."""

_UNNOTICED_US = 1000
"""Stall since a reading that is not worth another: a hundredth of the shortest window."""

_EARLY_S = 0.01
"""A sleep of 0.1 s may end this early: the look before still counts as one window ago."""


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
        self._descriptor = os.open(self.path, OPEN_FLAGS)

    def _parse(self) -> PsiTotals:
        if self._descriptor < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return parse_psi(os.pread(self._descriptor, _READ_BYTES, 0))


class Stall(NamedTuple):
    """Shares of wall time (0 to 1) lost to stalls over the last `interval_s`."""

    interval_s: float
    some: float
    full: float


class _Look(NamedTuple):
    """Counters and when they were read."""

    time_s: float
    some_us: float
    full_us: float


_NOTHING_YET = Stall(0.0, 0.0, 0.0)


class StallMeter:
    """Turns counters into shares. Time comes in with them, so that a recording replays exactly.

    Looks that are at least `WINDOW_S` apart give the share since the last one. Closer ones give the share of
    the last `WINDOW_S`; where that begins between two looks, the stall between them counts as spread evenly.
    So 10 ms of stall show as 0.1 in the next look, and for 0.1 s, however often one looks.

    The first look has nothing to compare with and gives zeros, as does every look until `WINDOW_S` later; and
    so does the first one after time went back, or after `STALE_S` without a look: the machine slept, or this
    process stood still, and what happened meanwhile says nothing of now.
    """

    def __init__(self) -> None:
        self._looks: deque[_Look] = deque()
        self._added_us = 0
        self._between: tuple[float, PsiTotals] | None = None

    def still(self, time_s: float, totals: PsiTotals) -> bool:
        """Whether hardly any stall came since the last `add`. If so it is a look as any other, and the next
        share is of the time since."""
        if not self._looks or not 0 <= totals.some_us - self._added_us <= _UNNOTICED_US:
            return False
        self._between = time_s, totals
        return True

    def add(self, time_s: float, totals: PsiTotals) -> Stall:
        """Take in the counters at `time_s` (monotonic) and give the shares of the time before."""
        if self._between is not None:
            between, self._between = self._between, None
            self.add(*between)
        now = _Look(time_s, *totals)
        self._added_us = totals.some_us
        if not self._follows(now):
            self._looks = deque([now])
            return _NOTHING_YET
        before = self._start_of_window(now)
        # Looks closer than this are not kept: they are 23 at the most, however often one looks.
        if time_s - self._looks[-1].time_s >= MIN_INTERVAL_S:
            self._looks.append(now)
        if before is None:
            return _NOTHING_YET
        interval_s = time_s - before.time_s
        return Stall(
            interval_s,
            _share(now.some_us - before.some_us, interval_s),
            _share(now.full_us - before.full_us, interval_s),
        )

    def _follows(self, now: _Look) -> bool:
        """Whether `now` can be compared with the look before it."""
        if not self._looks:
            return False
        last = self._looks[-1]
        in_time = 0.0 <= now.time_s - last.time_s <= STALE_S
        # Counters that went back are those of a cgroup that was made anew.
        return in_time and now.some_us >= last.some_us and now.full_us >= last.full_us

    def _start_of_window(self, now: _Look) -> _Look | None:
        """The counters that `now` is compared with; None while there are none so old."""
        looks, start_s = self._looks, now.time_s - WINDOW_S
        while len(looks) > 1 and looks[1].time_s <= start_s:
            looks.popleft()
        if looks[-1].time_s <= start_s + _EARLY_S:
            return looks[-1]
        if looks[0].time_s > start_s + 1e-6:
            return None
        return _between(looks[0], looks[1], start_s)


def _between(first: _Look, second: _Look, time_s: float) -> _Look:
    """The counters at `time_s`, between two looks."""
    if time_s <= first.time_s:
        return first
    part = (time_s - first.time_s) / (second.time_s - first.time_s)
    return _Look(
        time_s,
        first.some_us + part * (second.some_us - first.some_us),
        first.full_us + part * (second.full_us - first.full_us),
    )


def _share(stall_us: float, interval_s: float) -> float:
    return min(1.0, max(0.0, stall_us) / 1e6 / interval_s)
