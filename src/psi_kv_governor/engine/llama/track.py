"""Keeps the cell map in step with what llama.cpp did, and says when it can't be trusted."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from psi_kv_governor.engine.llama.cells import CellMap, Cells
from psi_kv_governor.engine.llama.context import Sequences
from psi_kv_governor.engine.llama.rows import Rows
from psi_kv_governor.engine.llama.tap import Tap
from psi_kv_governor.ledger import Ledger
from psi_kv_governor.policy.base import Range

_UNKNOWN_TOKEN = -1
# What llama.cpp saves of a cell beside its rows: 12 bytes a tensor and the position; 1,024 tensors at most.
_SAVED_HEADER_BYTES = 64 << 10


class Track:
    """The governed sequence of one context: where each position is, and which token it was.

    All calls are made at safe points.
    """

    def __init__(self, sequences: Sequences, tap: Tap, rows: Rows, n_cells: int) -> None:
        self.map = CellMap(n_cells)
        self.sequences = sequences
        self.distrust = ""
        """Why the cell map can't be relied on until the cache is next empty; '' while it can."""
        self.peak_holes = 0
        """Most positions that were missing in a decode since this was last set to 0."""
        self.settled = False
        """Everything decoded is entered, and the last position is live: the next decode can follow it."""
        self._tap = tap
        self._rows = rows
        self._tokens: npt.NDArray[np.int32] = np.full(n_cells, _UNKNOWN_TOKEN, dtype=np.int32)
        self._affected = np.zeros(n_cells, dtype=np.bool_)
        self._saved = (ctypes.c_uint8 * (rows.cell_bytes + _SAVED_HEADER_BYTES))()

    @property
    def in_step(self) -> bool:
        """Settled, and nothing was decoded past the governor since."""
        return self.settled and self._tap.counters.log_count == 0

    @property
    def ledger(self) -> Ledger:
        """Where each position is."""
        return self.map.ledger

    def tokens(self, part: Range) -> list[int] | None:
        """The tokens of `part`, or None where one is not known (image input has none)."""
        tokens = self._tokens[part.start : part.stop]
        return None if np.any(tokens == _UNKNOWN_TOKEN) else tokens.tolist()

    def expect(self, start: int, tokens: npt.NDArray[np.int32] | None) -> None:
        """`tokens` are about to be decoded at positions `start` on; None for input that has none."""
        self.settled = False
        if tokens is None:
            self._tokens[start:] = _UNKNOWN_TOKEN
        else:
            self._tokens[start : start + len(tokens)] = tokens

    def decoded(self, start: int, n_tokens: int) -> None:
        """A decode came back without an error. The common case of `catch_up`, and all that a token costs:
        with cold caches behind a pass over the weights each call into a library takes microseconds."""
        counters = self._tap.counters
        usual = counters.problem == 0 and counters.log_count == n_tokens and not self.distrust
        if not usual or start != len(self.ledger):
            self.catch_up()
            return
        if holes := self.ledger.holes():
            self.peak_holes = max(self.peak_holes, holes)
        self._affected[start : start + n_tokens] = holes > 0
        self.map.extend(self._tap.log[:n_tokens])
        counters.log_count = 0
        self.settled = True

    def affected(self) -> int:
        """Positions that were decoded while others were missing: their rows stay as they are."""
        return int(np.count_nonzero(self._affected[: len(self.ledger)]))

    def catch_up(self) -> None:
        """Enter what was decoded since the last look. Harmless to repeat, and it has to be: Ctrl-C, or a
        decode that failed or was aborted half way, may have come between a decode and its entry."""
        length = self.sequences.length()
        self._enter(Range(len(self.ledger), length))
        self.settled = length == len(self.ledger) and not self.distrust

    def recomputed(self, start: int) -> None:
        """The lost positions from `start` on were decoded again, to where llama.cpp's sequence ends now."""
        self._enter(Range(start, self.sequences.length()))

    def _enter(self, part: Range) -> None:
        cells, problem = self._tap.cells(), self._tap.problem()
        self._tap.clear()
        if part.cells <= 0 or self.distrust:
            self.map.stray(cells)
            return
        if problem or len(cells) < part.cells or part.stop > len(self._tokens):
            self.distrust = problem or "a decode went past the governor"
            return
        holes = self.ledger.holes(Range(0, part.start))
        self._affected[part.start : part.stop] = holes > 0
        self.peak_holes = max(self.peak_holes, holes)
        self.map.stray(cells[part.cells :])
        self.map.place(part.start, cells[: part.cells])

    def truncate(self, length: int) -> None:
        """The sequence ends at `length` now. What comes there next has tokens of its own."""
        self.settled = False
        self.map.truncate(length)
        self._tokens[length:] = _UNKNOWN_TOKEN

    def emptied(self) -> None:
        """The cache is empty: whatever was not understood is gone with it."""
        self.truncate(0)
        self._tap.clear()
        self.distrust = ""

    def loaded(self, by_cell: Cells, tokens: npt.NDArray[np.int32]) -> None:
        """A saved state was loaded into the empty cache: cell i holds position `by_cell[i]`."""
        self._tap.clear()
        self.settled = False
        self.map.place(0, np.argsort(by_cell))
        self._tokens[: len(by_cell)] = tokens
        self._affected[: len(by_cell)] = False
        if len(by_cell):
            self.check({0, len(by_cell) // 2, len(by_cell) - 1})

    def by_cell(self) -> Cells:
        """The positions in the order of their cells, for `loaded`. Everything must be live."""
        return np.argsort(self.map.cells(Range(0, len(self.ledger))))

    def check(self, positions: Iterable[int]) -> None:
        """Distrust the cell map unless llama.cpp saves, for each live position, the rows it points to."""
        for position in positions:
            saved = self.sequences.saved_position(position, self._saved)
            if not self._rows.are_in(saved, int(self.map.cells(Range(position, position + 1))[0])):
                self.distrust = f"the row of position {position} is not where it was expected"
