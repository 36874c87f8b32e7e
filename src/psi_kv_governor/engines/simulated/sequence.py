"""One simulated sequence: where each of its positions is, and which of them are resident."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from psi_kv_governor.cache import Range, SequenceState

RUNNING_S = 1.0
"""A sequence that was decoded within so long is running: between two tokens of a slow machine."""

_NEVER, _LIVE, _MASKED, _LOST = 0, 1, 2, 3

_Cells = npt.NDArray[np.bool_]


class Counts(NamedTuple):
    """Cells of a sequence."""

    live: int = 0
    masked: int = 0
    lost: int = 0
    resident: int = 0
    """Live cells in memory: what is masked or lost never is."""
    dirty: int = 0
    affected: int = 0

    @property
    def used(self) -> int:
        """Cells of the cache that are the sequence's, parked or not."""
        return self.live + self.masked + self.lost

    @property
    def parked(self) -> int:
        """Cells whose only copy is in a file."""
        return self.live - self.resident + self.masked


class PaperSequence:
    """Positions of one sequence. What takes ranges gives the number of cells that it really changed."""

    def __init__(self, number: int, capacity: int) -> None:
        self.id = number
        self.next_position = 0
        self.last_used_s = 0.0
        self.head_cells = 0
        self.running: bool | None = None
        """Set by hand; None: by the time of the last decode."""
        self._place = np.zeros(capacity, np.uint8)
        self._resident = np.zeros(capacity, bool)
        self._written = np.zeros(capacity, bool)
        self._affected = np.zeros(capacity, bool)
        self._counts: Counts | None = Counts()
        self._live: tuple[Range, ...] = ()
        self._masked: tuple[Range, ...] = ()
        self._lost: tuple[Range, ...] = ()

    @property
    def counts(self) -> Counts:
        """Cells by what they are."""
        if self._counts is None:
            live, written = self._place == _LIVE, self._written
            used = self._place[: self.next_position]
            self._live, self._masked, self._lost = (_runs(used == place) for place in (_LIVE, _MASKED, _LOST))
            self._counts = Counts(
                live=_count(live),
                masked=_count(self._place == _MASKED),
                lost=_count(self._place == _LOST),
                resident=_count(self._resident),
                dirty=_count(self._resident & ~written),
                affected=_count(self._affected),
            )
        return self._counts

    def decode(self, cells: int, now_s: float) -> int:
        """Append `cells` tokens. All live positions are read for it: parked ones are resident again, and
        their number is given."""
        counts = self.counts
        came_back = counts.live - counts.resident
        if came_back:
            self._resident |= self._place == _LIVE
            self._changed()
        self.last_used_s = now_s
        if not cells:
            return came_back
        counts = self.counts  # of a cache that only grows they are not taken again
        start, self.next_position = self.next_position, self.next_position + cells
        new = slice(start, self.next_position)
        away = counts.masked + counts.lost > 0
        self._place[new], self._resident[new], self._affected[new] = _LIVE, True, away
        self._counts = Counts(
            live=counts.live + cells,
            masked=counts.masked,
            lost=counts.lost,
            resident=counts.resident + cells,
            dirty=counts.dirty + cells,
            affected=counts.affected + cells * away,
        )
        before = self._live[-1:]
        if before and before[0].stop == start:
            self._live = (*self._live[:-1], Range(before[0].start, self.next_position))
        else:
            self._live = (*self._live, Range(start, self.next_position))
        return came_back

    def truncate(self, length: int) -> int:
        """Forget the positions from `length` on. Gives how many of them were resident."""
        freed = _count(self._resident[length:])
        for cells in (self._place, self._resident, self._written, self._affected):
            cells[length:] = 0
        self.next_position = min(self.next_position, length)
        self._changed()
        return freed

    def park(self, ranges: tuple[Range, ...], most: int) -> tuple[int, int]:
        """Cells parked, and those of them that had to be written for it."""
        chosen = self._first(self._within(ranges) & self._resident, most)
        return self._leave(chosen, _LIVE)

    def mask(self, ranges: tuple[Range, ...], most: int) -> tuple[int, int, int]:
        """Cells masked, those of them that were resident, and those that had to be written."""
        chosen = self._first(self._within(ranges) & (self._place == _LIVE), most)
        resident, written = self._leave(chosen, _MASKED)
        return _count(chosen), resident, written

    def evict(self, ranges: tuple[Range, ...], most: int) -> tuple[int, int]:
        """Cells dropped, and those of them that were resident."""
        chosen = self._first(self._within(ranges) & (self._place == _LIVE), most)
        resident = _count(chosen & self._resident)
        self._place[chosen], self._resident[chosen], self._written[chosen] = _LOST, False, False
        self._changed()
        return _count(chosen), resident

    def unmask(self, ranges: tuple[Range, ...], most: int) -> int:
        """Cells that are live and resident again. Their copy in the file stays good."""
        chosen = self._first(self._within(ranges) & (self._place == _MASKED), most)
        self._place[chosen], self._resident[chosen] = _LIVE, True
        self._changed()
        return _count(chosen)

    def unpark(self, ranges: tuple[Range, ...], most: int) -> int:
        """Live cells that are resident again."""
        chosen = self._first(self._within(ranges) & (self._place == _LIVE) & ~self._resident, most)
        self._resident[chosen] = True
        self._changed()
        return _count(chosen)

    def write(self, ranges: tuple[Range, ...], most: int) -> int:
        """Dirty cells that have a copy in the file now."""
        chosen = self._first(self._within(ranges) & self._resident & ~self._written, most)
        self._written[chosen] = True
        self._changed()
        return _count(chosen)

    def unmask_all(self) -> None:
        """The engine leaves: what is masked is read from the file like anything parked."""
        self._place[self._place == _MASKED] = _LIVE
        self._changed()

    def known(self, part: Range) -> _Cells:
        """Which positions of `part` are live, shape (part.cells,)."""
        return np.asarray(self._place[part.start : part.stop] == _LIVE)

    def state(self, cell_bytes: int, now_s: float) -> SequenceState:
        """How it stands."""
        counts, running = self.counts, self.running
        if running is None:
            running = self.next_position > 0 and now_s - self.last_used_s < RUNNING_S
        return SequenceState(
            id=self.id,
            next_position=self.next_position,
            live=self._live,
            masked=self._masked,
            lost=self._lost,
            affected=counts.affected,
            parked_bytes=(counts.live - counts.resident) * cell_bytes,
            dirty_bytes=counts.dirty * cell_bytes,
            running=running,
            last_used_s=self.last_used_s,
            head_cells=self.head_cells,
        )

    def _changed(self) -> None:
        """Cells went or came: everything is counted anew when it is asked for."""
        self._counts = None

    def _leave(self, chosen: _Cells, place: int) -> tuple[int, int]:
        resident = _count(chosen & self._resident)
        written = _count(chosen & ~self._written)
        self._place[chosen], self._resident[chosen], self._written[chosen] = place, False, True
        self._changed()
        return resident, written

    def _within(self, ranges: tuple[Range, ...]) -> _Cells:
        """The positions of `ranges`, all without any; what was never decoded is in none."""
        if not ranges:
            return np.ones(len(self._place), bool)
        inside = np.zeros(len(self._place), bool)
        for part in ranges:
            inside[part.start : part.stop] = True
        return inside

    @staticmethod
    def _first(chosen: _Cells, most: int) -> _Cells:
        """The first `most` of what is chosen."""
        if np.count_nonzero(chosen) > most:
            chosen[np.flatnonzero(chosen)[most:]] = False
        return chosen


def _count(chosen: _Cells) -> int:
    return int(np.count_nonzero(chosen))


def _runs(chosen: _Cells) -> tuple[Range, ...]:
    padded = np.zeros(len(chosen) + 2, np.int8)
    padded[1:-1] = chosen
    edges = np.flatnonzero(padded[1:] != padded[:-1])
    return tuple(Range(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True))
