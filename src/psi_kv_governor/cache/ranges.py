"""Positions of a sequence, as every room names them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Range(NamedTuple):
    """Positions `start` to `stop` (exclusive) of one sequence."""

    start: int
    stop: int

    @property
    def cells(self) -> int:
        """Number of positions, and so of cells, in the range."""
        return self.stop - self.start


def cells_in(ranges: Sequence[Range]) -> int:
    """Number of positions in disjoint `ranges`."""
    cells = 0
    for start, stop in ranges:
        cells += stop - start
    return cells


def without(part: Range, gone: Range) -> Iterator[Range]:
    """What is left of `part` without `gone`: none, one or two ranges."""
    for rest in (Range(part.start, min(part.stop, gone.start)), Range(max(part.start, gone.stop), part.stop)):
        if rest.cells > 0:
            yield rest


def merged(ranges: Sequence[Range]) -> list[Range]:
    """The same positions as sorted, disjoint ranges, with adjacent ones joined."""
    joined: list[Range] = []
    for part in sorted(ranges):
        if joined and joined[-1].stop >= part.start:
            joined[-1] = Range(joined[-1].start, max(joined[-1].stop, part.stop))
        else:
            joined.append(part)
    return joined
