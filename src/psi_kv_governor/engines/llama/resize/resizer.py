"""Makes one context anew with another number of cells, and puts back what is kept."""

from __future__ import annotations

import ctypes
import functools
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import llama_cpp

from psi_kv_governor.cache import Range, cells_in, merged, without
from psi_kv_governor.engines.llama.resize.pieces import Piece, Place, check_space, load, save
from psi_kv_governor.engines.llama.resize.sizes import Sizes, padded
from psi_kv_governor.errors import EngineError

_MOST_PIECES = 200
"""So many ranges are given up at the most, the longest: each is an open file, and 1,024 are usual."""
_LEAST_PIECE_CELLS = 256
"""A long range goes in several files, so that a part can come back: of so many cells at least, 64 of them."""


class Resizer:
    """One llama_context that may be freed and made again. Whoever calls holds the lock of its owner."""

    def __init__(
        self,
        model: Any,
        params: Any,
        pointer: Any,
        *,
        sizes: Sizes,
        place: Place,
        cell_bytes: int,
        most_outputs: int = 0,
    ) -> None:
        self.pointer: Any = pointer
        """The llama_context; None where there was no memory for any."""
        self.sizes = sizes
        self.cells = llama_cpp.llama_n_ctx(pointer)
        """Cells that it has now."""
        self.cell_bytes = cell_bytes
        self.pieces: tuple[Piece, ...] = ()
        """What is in files, in the order of positions."""
        self.end = 0
        """The position after the highest."""
        self.given_cells = 0
        """What the last rebuild gave up."""
        self.on_new: Callable[[Any], None] = lambda pointer: None
        """Called with each new context, for what is set in it after it is made."""
        self.most_outputs = most_outputs
        """Rows of logits that one decode may ask of a context made here; 0: as of the program's own."""
        self.outputs_limited = False
        """The context there is now has fewer than the program's own had."""
        self._model = model
        self._params = params
        self._place = place
        self._kept: list[Piece] = []  # while there is no context: all of it

    # -- what is there ----------------------------------------------------------------------------------

    def live(self, *, parked: bool = False) -> list[Range]:
        """Positions in the context; with `parked` also those that come back before the next token."""
        out = [piece.part for piece in self.pieces if piece.masked or not parked]
        left = [Range(0, self.end)] if self.end else []
        for gone in out:
            left = [rest for part in left for rest in without(part, gone)]
        return left

    @property
    def used(self) -> int:
        """Cells of the context that hold something."""
        return cells_in(self.live())

    def look(self) -> None:
        """Ask llama.cpp where sequence 0 ends."""
        top = llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(self.pointer), 0)
        self.end = max([top + 1, *(piece.part.stop for piece in self.pieces)])

    # -- cutting ----------------------------------------------------------------------------------------

    def cut(self, start: int, stop: int) -> None:
        """The program removed these positions: what is saved of them is forgotten."""
        stop = self.end if stop < 0 else stop
        gone = Range(max(0, start), max(stop, 0, start))
        left = []
        for piece in self.pieces:
            parts = list(without(piece.part, gone))
            if len(parts) == 1:
                piece.part = parts[0]
                left.append(piece)
            elif parts:  # its middle: two pieces of one file would need it twice, and nobody cuts there
                raise EngineError("a range inside of what was given up can't be removed")
            else:
                piece.close()
        self.pieces = tuple(left)

    # -- another size -----------------------------------------------------------------------------------

    def rebuild(
        self,
        cells: Callable[[int], int],
        give: Sequence[Range] = (),
        back: Iterable[Piece] = (),
        *,
        masked: bool = False,
    ) -> None:
        """Give `give` up, bring `back` back, and have as many cells as `cells` says for what is live then.

        Raises EngineError with everything as it was before; only where even the old context can't be made
        again there is none (`pointer`), and `come_home` tries again.
        """
        self.come_home()
        back = set(back)
        give = self._in_pieces(merged([p for part in give for p in _within(self.live(), part)]))
        self.given_cells = cells_in(give)
        check_space(self._place, int(1.1 * self.cell_bytes * self.used) + (1 << 20))
        given: list[Piece] = []
        kept: list[Piece] = []
        try:
            given += [save(self.pointer, [part], self._place, masked=masked) for part in give]
            kept += self._save_kept(give, back)
        except EngineError:
            _close(given + kept)
            raise
        old, old_cells = sorted([*given, *kept], key=_start), self.cells
        stay = [piece for piece in self.pieces if piece not in back]
        new = sorted([*kept, *back], key=_start)
        size = cells(self.used - cells_in(give) + sum(piece.part.cells for piece in back))
        size = max(size, padded(_most_at_once(new)))
        self._free()
        try:
            self._make(size, new)
        except EngineError as error:
            self._after_failure(old, old_cells, error)
            _close(given + kept)
            raise EngineError(f"{error}; the context is as it was") from error
        for piece in given:
            piece.settle()
        self.pieces = tuple(sorted([*stay, *given], key=_start))
        _close([*kept, *back])

    def come_home(self) -> None:
        """Make a context where there is none. Raises EngineError where there is still no memory for it."""
        if self.pointer is not None:
            return
        self._make(self.cells, self._kept)
        _close(piece for piece in self._kept if piece not in self.pieces)
        self._kept = []

    def forget(self) -> None:
        """Drop what is saved: the program put something else in its place, or closes."""
        _close(self.pieces)
        self.pieces = ()

    def _in_pieces(self, parts: Sequence[Range]) -> list[Range]:
        most = max(_LEAST_PIECE_CELLS, self.sizes.logical // 64)
        cut = [
            Range(start, min(start + most, part.stop))
            for part in parts
            for start in range(part.start, part.stop, most)
        ]
        free = max(0, _MOST_PIECES - len(self.pieces))
        return sorted(sorted(cut, key=lambda part: -part.cells)[:free])

    def _save_kept(self, give: Sequence[Range], back: set[Piece]) -> list[Piece]:
        """What stays, in one file for each stretch between what goes or comes: so all of it can be put back
        in the order of positions, also when it has to be as before."""
        parts = self.live()
        for gone in give:
            parts = [rest for part in parts for rest in without(part, gone)]
        borders = sorted([*(part.start for part in give), *(piece.part.start for piece in back)])
        stretches: dict[int, list[Range]] = {}
        for part in parts:
            stretches.setdefault(bisect_left(borders, part.start), []).append(part)
        kept: list[Piece] = []
        try:
            for stretch in stretches.values():
                kept.append(save(self.pointer, stretch, self._place, masked=False))
        except EngineError:
            _close(kept)
            raise
        return kept

    def _after_failure(self, old: list[Piece], old_cells: int, error: EngineError) -> None:
        try:
            self._make(old_cells, old)
        except EngineError as again:
            self._kept, self.cells = old, old_cells
            raise EngineError(
                f"there is no memory for the model's context any more ({again}): its content is in files, "
                "and it is made again at the next request"
            ) from error

    def _make(self, cells: int, content: Sequence[Piece]) -> None:
        """A new context with `content`. Raises EngineError, and then there is none."""
        params = type(self._params).from_buffer_copy(self._params)
        params.n_ctx = cells
        limited = bool(self.most_outputs) and not params.n_outputs_max
        if limited:
            params.n_outputs_max = max(self.most_outputs, params.n_seq_max)
        pointer = llama_cpp.llama_init_from_model(self._model, params)
        if not pointer:
            raise EngineError(f"there is no memory for a context of {cells:,} cells")
        self.pointer = pointer
        try:
            for piece in content:
                load(pointer, piece)
        except EngineError:
            self._free()
            raise
        self.cells = llama_cpp.llama_n_ctx(pointer)
        self.outputs_limited = limited
        self.on_new(pointer)

    def _free(self) -> None:
        pointer, self.pointer = self.pointer, None
        if pointer is not None:
            llama_cpp.llama_free(pointer)
        _trim_heap()


def _start(piece: Piece) -> int:
    return piece.part.start


def _most_at_once(content: Sequence[Piece]) -> int:
    """Cells taken while these are read one after the other: of one whose tail was cut, all for a moment."""
    most = there = 0
    for piece in content:
        most = max(most, there + piece.stored)
        there += min(piece.stored, piece.part.cells)
    return most


def _within(live: Sequence[Range], part: Range) -> list[Range]:
    cut = [Range(max(one.start, part.start), min(one.stop, part.stop)) for one in live]
    return [one for one in cut if one.cells > 0]


def _close(pieces: Iterable[Piece]) -> None:
    for piece in pieces:
        piece.close()


@functools.cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def _trim_heap() -> None:
    """What a freed context leaves in the C library's heap: 2 to 122 MiB more went back here."""
    if (trim := _malloc_trim()) is not None:
        trim(0)
