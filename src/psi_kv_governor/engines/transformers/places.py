"""Which positions of a sequence have a row, and which row: rows of live positions stand packed, in order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from psi_kv_governor.cache import Range, cells_in, merged, without

Positions = npt.NDArray[np.int64]


class Places:
    """Positions 0 to `next_position`: live, masked (parked apart) or lost. Plain bookkeeping."""

    def __init__(self) -> None:
        self.next_position = 0
        self.masked: tuple[Range, ...] = ()
        self.lost: tuple[Range, ...] = ()

    @property
    def holes(self) -> list[Range]:
        """Positions without a row."""
        return merged([*self.masked, *self.lost])

    @property
    def live(self) -> tuple[Range, ...]:
        """Positions with a row."""
        return tuple(_less([Range(0, self.next_position)], self.holes))

    @property
    def live_cells(self) -> int:
        """Number of rows."""
        return self.next_position - cells_in(self.masked) - cells_in(self.lost)

    def row_of(self, position: int) -> int:
        """The row of a live position; of another, the row before which it would stand."""
        return position - sum(
            min(hole.stop, position) - hole.start for hole in self.holes if hole.start < position
        )

    def rows_of(self, ranges: Sequence[Range]) -> list[Range]:
        """The rows of live ranges."""
        first = [self.row_of(part.start) for part in ranges]
        return [Range(row, row + part.cells) for row, part in zip(first, ranges, strict=True)]

    def live_part(self, ranges: Sequence[Range]) -> list[Range]:
        """The live positions among `ranges`, sorted and disjoint."""
        return _common(merged(ranges), self.live)

    def masked_part(self, ranges: Sequence[Range]) -> list[Range]:
        """The masked positions among `ranges`, sorted and disjoint."""
        return _common(merged(ranges), self.masked)

    def mask(self, ranges: Sequence[Range]) -> None:
        """These live positions have no row any more, and their content is kept elsewhere."""
        self.masked = tuple(merged([*self.masked, *ranges]))

    def lose(self, ranges: Sequence[Range]) -> None:
        """These live positions have no row any more, and nobody has their content."""
        self.lost = tuple(merged([*self.lost, *ranges]))

    def unmask(self, ranges: Sequence[Range]) -> None:
        """These masked positions have rows again."""
        self.masked = tuple(_less(self.masked, ranges))

    def crop(self, length: int) -> None:
        """Positions from `length` on are gone."""
        self.next_position = min(self.next_position, length)
        end = [Range(0, length)]
        self.masked, self.lost = tuple(_common(self.masked, end)), tuple(_common(self.lost, end))

    def live_positions(self) -> Positions:
        """The position of each row, in order."""
        return numbers_in(self.live)


def numbers_in(ranges: Sequence[Range]) -> Positions:
    """Every number in `ranges`, one range after the other."""
    runs = [np.arange(run.start, run.stop, dtype=np.int64) for run in ranges]
    return np.concatenate(runs) if runs else np.empty(0, dtype=np.int64)


def ranges_of(numbers: Positions) -> list[Range]:
    """Rising numbers as ranges."""
    ends = np.flatnonzero(np.diff(numbers) != 1)
    starts, stops = numbers[np.r_[0, ends + 1]], numbers[np.r_[ends, len(numbers) - 1]] + 1
    return [Range(int(start), int(stop)) for start, stop in zip(starts, stops, strict=True)]


def first_cells(ranges: Sequence[Range], cells: int) -> list[Range]:
    """The first `cells` positions of sorted `ranges`."""
    taken: list[Range] = []
    for part in ranges:
        if cells <= 0:
            break
        taken.append(Range(part.start, min(part.stop, part.start + cells)))
        cells -= taken[-1].cells
    return taken


def cells_after(ranges: Sequence[Range], position: int) -> list[Range]:
    """What of sorted `ranges` lies from `position` on."""
    return [Range(max(part.start, position), part.stop) for part in ranges if part.stop > position]


def _less(ranges: Sequence[Range], gone: Sequence[Range]) -> list[Range]:
    left = list(ranges)
    for hole in gone:
        left = [rest for part in left for rest in without(part, hole)]
    return left


def _common(ranges: Sequence[Range], others: Sequence[Range]) -> list[Range]:
    found = []
    for part in ranges:
        for other in others:
            both = Range(max(part.start, other.start), min(part.stop, other.stop))
            if both.cells > 0:
                found.append(both)
    return found
