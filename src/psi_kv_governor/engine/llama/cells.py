"""Which cell holds which position, which cells are live, and which rows may be resident."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from psi_kv_governor.ledger import LIVE, LOST, SPILLED, Ledger
from psi_kv_governor.policy.base import Range

Cells = npt.NDArray[np.int64]


def runs_of(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Runs of True in `mask` (n,), as half-open pairs, shape (runs, 2)."""
    padded = np.concatenate(([False], mask, [False]))
    return np.flatnonzero(padded[1:] != padded[:-1]).reshape(-1, 2)


class CellMap:
    """Positions of the governed sequence and the cells of the cache, kept in step with the ledger.

    A spilled position keeps its cell: the cell stays occupied (by a sequence nobody decodes), so nothing
    else can move in, and the rows go back to exactly where they were.
    """

    def __init__(self, n_cells: int) -> None:
        self.ledger = Ledger(n_cells)
        self._cell_of: Cells = np.full(n_cells, -1, dtype=np.int64)
        self._live = np.zeros(n_cells, dtype=np.bool_)
        self._written = np.zeros(n_cells, dtype=np.bool_)
        self.stale = False
        """Something may be returnable. May be read without a safe point."""

    def cells(self, positions: Range) -> Cells:
        """The cells of `positions`, in order. Only live and spilled positions have one."""
        return self._cell_of[positions.start : positions.stop]

    def place(self, start: int, cells: Cells) -> None:
        """Positions from `start` on were decoded into `cells`. Saying it twice changes nothing."""
        positions = Range(start, start + len(cells))
        self._cell_of[positions.start : positions.stop] = cells
        self._live[cells] = True
        self._written[cells] = True
        # Last, so that an entry which Ctrl-C cuts short counts as not made, and is made again.
        self.ledger.mark(positions, LIVE)

    def extend(self, cells: Cells) -> None:
        """The next positions were decoded into `cells`."""
        start = len(self.ledger)
        self.ledger.extend(len(cells))
        self._cell_of[start : start + len(cells)] = cells
        self._live[cells] = True
        self._written[cells] = True

    def truncate(self, length: int) -> None:
        """The sequence ends at `length` now."""
        gone = Range(min(length, len(self.ledger)), len(self.ledger))
        self._vacate(gone, LIVE)
        self.ledger.truncate(length)

    def park(self, positions: Range) -> None:
        """The rows of live `positions` are in the store; their cells wait for them."""
        self._live[self.cells(positions)] = False
        self.stale = True
        self.ledger.mark(positions, SPILLED)

    def unpark(self, positions: Range) -> None:
        """The rows of spilled `positions` are back in their cells."""
        self.place(positions.start, self.cells(positions))

    def lose(self, positions: Range) -> None:
        """The rows of `positions` are gone, and their cells free."""
        self._vacate(positions, LIVE)
        self.ledger.mark(positions, LOST)

    def _vacate(self, positions: Range, place: int) -> None:
        for run in self.ledger.ranges(place, positions):
            self._live[self.cells(run)] = False
            self.stale = True

    def stray(self, cells: Cells) -> None:
        """Rows of `cells` may have been written by a decode that did not come to its end."""
        self._written[cells] = True
        self.stale = True

    def touched(self, positions: Range) -> None:
        """The rows of spilled `positions` were written (a restore that failed half way)."""
        self.stray(self.cells(positions))

    def all_written(self) -> None:
        """Somebody wrote to the whole cache: any row may be resident."""
        self._written[:] = True
        self.stale = True

    def returnable(self) -> Cells:
        """What can be released, shape (runs, 4): dead cells [0, 1), and of them the written ones [2, 3).

        The second pair keeps a release from counting pages that were only ever read: the kernel maps those
        to its one zero page, which looks resident and costs nothing.
        """
        dead = runs_of(~self._live)
        written = runs_of(~self._live & self._written)
        around = dead[np.searchsorted(dead[:, 0], written[:, 0], side="right") - 1]
        return np.ascontiguousarray(np.concatenate((around, written), axis=1))

    def released(self) -> None:
        """Everything returnable has been returned."""
        self._written &= self._live
        self.stale = False
