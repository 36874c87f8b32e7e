"""Where each token of a sequence is: in the cache, in the store, or lost (invariant 2)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from psi_kv_governor.policy.base import Range

LIVE = 1
SPILLED = 2
LOST = 3


class Ledger:
    """One byte a position: LIVE, SPILLED or LOST. Position `len(ledger)` is the next to be decoded."""

    def __init__(self, capacity: int) -> None:
        self._place: npt.NDArray[np.uint8] = np.zeros(capacity, dtype=np.uint8)
        self._length = 0
        self._holes = 0
        self._arrived: npt.NDArray[np.int64] = np.zeros(capacity, dtype=np.int64)
        self._arrivals = 0

    @property
    def capacity(self) -> int:
        """Most positions that the sequence can have."""
        return len(self._place)

    def __len__(self) -> int:
        return self._length

    def count(self, place: int) -> int:
        """Number of positions at `place`."""
        return int(np.count_nonzero(self._place[: self._length] == place))

    def mark(self, positions: Range, place: int) -> None:
        """Move `positions` to `place`; positions after the end make the sequence longer."""
        if not 0 <= positions.start <= positions.stop <= len(self._place):
            raise ValueError(f"positions {positions} are outside the cache of {len(self._place)} cells")
        if positions.start > self._length:
            raise ValueError(f"position {positions.start} would leave a hole after {self._length}")
        if place == LIVE:
            self._note_arrival(positions)
        self._holes -= self.holes(positions)
        self._place[positions.start : positions.stop] = place
        self._length = max(self._length, positions.stop)
        self._holes += self.holes(positions)

    def extend(self, cells: int) -> None:
        """So many positions more are live: `mark` for a decode at the end, without looking at the rest."""
        start, self._length = self._length, self._length + cells
        self._arrivals += 1
        self._arrived[start : self._length] = self._arrivals
        self._place[start : self._length] = LIVE

    def _note_arrival(self, positions: Range) -> None:
        new = self._place[positions.start : positions.stop] != LIVE
        new[max(0, self._length - positions.start) :] = True
        self._arrivals += 1
        self._arrived[positions.start : positions.stop][new] = self._arrivals

    def arrivals(self, part: Range) -> npt.NDArray[np.float64]:
        """When each live position of `part` last came into the cache, as a rising number; NaN elsewhere."""
        arrived = np.full(part.cells, np.nan)
        for run in self.ranges(LIVE, part):
            arrived[run.start - part.start : run.stop - part.start] = self._arrived[run.start : run.stop]
        return arrived

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        length = min(self._length, max(0, length))
        self._holes -= self.holes(Range(length, self._length))
        self._length = length

    def ranges(self, place: int, within: Range | None = None) -> Iterator[Range]:
        """The runs of positions at `place`, in order, clipped to `within`."""
        start, stop = within or (0, self._length)
        stop = min(stop, self._length)
        here = np.concatenate(([False], self._place[start:stop] == place, [False]))
        edges = np.flatnonzero(here[1:] != here[:-1]) + start
        for first, last in edges.reshape(-1, 2):
            yield Range(int(first), int(last))

    def holes(self, within: Range | None = None) -> int:
        """Number of positions that are not in the cache, spilled or lost."""
        if within is None:
            return self._holes
        return int(np.count_nonzero(self._place[within.start : min(within.stop, self._length)] != LIVE))
