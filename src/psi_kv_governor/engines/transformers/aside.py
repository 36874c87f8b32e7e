"""Rows that were taken out of a cache, parked in files of their own until they are wanted again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from psi_kv_governor.cache import Range
from psi_kv_governor.engines.transformers.places import Positions, numbers_in, ranges_of
from psi_kv_governor.engines.transformers.rows import Rows
from psi_kv_governor.kernel.memory import PAGE_BYTES
from psi_kv_governor.residence import Mapping, Place

MOST_FILES = 64
"""Of a cache: with more, what is parked in the smaller half of them is put into one."""


class Aside:
    """The rows of some positions in all layers: each tensor's part begins on a page of its own."""

    def __init__(self, positions: Positions, tensors: Sequence[Rows], place: Place) -> None:
        """Make room for the rows of `positions`. Raises OSError when there is no address space."""
        self.positions = positions
        """Those that are here, in order: fewer than at first when tokens were cropped."""
        self.order: torch.Tensor | None = None
        """The batch was put in another order since: member i is what `order[i]` was. None: it was not."""
        self._shapes = [(rows.shape, rows.dtype) for rows in tensors]
        self._sizes = [len(self.positions) * rows.row_bytes for rows in tensors]
        starts = np.cumsum([0, *(-(-size // PAGE_BYTES) * PAGE_BYTES for size in self._sizes)])
        self._starts = [int(start) for start in starts]
        self.mapping = Mapping(self._starts[-1], place=place)
        self.written_bytes = 0

    def fill(self, index: int, parts: Sequence[torch.Tensor]) -> str:
        """Put the rows `parts` of tensor number `index` here, one after the other, and park them. Gives what
        went wrong, or ''."""
        into = self._tensor(index)
        at = 0
        for part in parts:
            into[:, :, at : at + part.shape[2]].copy_(part)
            at += part.shape[2]
        done = self.mapping.park([(self._starts[index], self._starts[index + 1])])
        self.written_bytes += done.written_bytes
        return done.problem

    def take(self, index: int, positions: Positions) -> torch.Tensor:
        """The rows of these positions in tensor number `index`: [batch, heads, rows, head_dim], a copy."""
        where = torch.from_numpy(np.searchsorted(self.positions, positions))
        rows = self._tensor(index).index_select(2, where)
        return rows if self.order is None else rows.index_select(0, self.order)

    def forget(self, index: int) -> None:
        """The pages of tensor number `index` may go from memory again: they were read and stay on disk."""
        self.mapping.park([(self._starts[index], self._starts[index + 1])])

    def reorder(self, order: torch.Tensor) -> None:
        """Note that the batch was put in another order; applied when the rows come back."""
        self.order = order.clone() if self.order is None else self.order.index_select(0, order)

    def crop(self, length: int) -> None:
        """Positions from `length` on are gone: others will stand there."""
        self.positions = self.positions[: int(np.searchsorted(self.positions, length))]

    def close(self) -> None:
        """Drop everything, also from the disk."""
        self.mapping.close()

    def _tensor(self, index: int) -> torch.Tensor:
        shape, dtype = self._shapes[index]
        flat = torch.frombuffer(
            self.mapping.buffer,
            dtype=dtype,
            count=self._sizes[index] // dtype.itemsize,
            offset=self._starts[index],
        )
        return flat.view(shape[0], shape[1], -1, shape[2])


class Asides:
    """All that was taken out of one cache. What came back stays here as well, as long as something is
    masked: rows never change, so that the same rows can go again without being written."""

    def __init__(self) -> None:
        self.files: list[Aside] = []
        self.written_bytes = 0

    def put(self, gone: Sequence[Range], runs: Sequence[Range], tensors: Sequence[Rows], place: Place) -> str:
        """Have the rows `runs`, those of the positions `gone`, here. Gives what went wrong, or ''."""
        positions, rows = numbers_in(gone), numbers_in(runs)
        absent = _absent(self.files, positions)
        if not len(absent):
            return ""
        wanted = ranges_of(rows[np.searchsorted(positions, absent)])
        return self._write(absent, tensors, place, lambda index: [tensors[index].at(*run) for run in wanted])

    def sources(self, positions: Positions) -> list[tuple[Aside, Positions]]:
        """Who has which of these positions; each is named once."""
        return _sources(self.files, positions)

    def tidy(self, masked: Sequence[Range], tensors: Sequence[Rows], place: Place | None) -> None:
        """Close everything when nothing is masked; when there are many files, join the smaller ones."""
        if not masked:
            self.close()
        elif len(self.files) > MOST_FILES and place is not None:
            self._join(numbers_in(masked), tensors, place)

    def _join(self, masked: Positions, tensors: Sequence[Rows], place: Place) -> None:
        before = sorted(self.files, key=lambda aside: len(aside.positions))
        small, rest = before[: len(before) // 2], before[len(before) // 2 :]
        masked = _absent(rest, masked)
        sources = _sources(small, masked)

        def rows_of(index: int) -> list[torch.Tensor]:
            batch, heads, width = tensors[index].shape
            rows = torch.empty((batch, heads, len(masked), width), dtype=tensors[index].dtype)
            for aside, found in sources:
                rows.index_copy_(
                    2, torch.from_numpy(np.searchsorted(masked, found)), aside.take(index, found)
                )
                aside.forget(index)
            return [rows]

        self.files = rest
        if len(masked) and self._write(masked, tensors, place, rows_of):
            self.files = before  # it stays as it was: many files
            return
        for aside in small:
            aside.close()

    def _write(
        self,
        positions: Positions,
        tensors: Sequence[Rows],
        place: Place,
        parts: Callable[[int], Sequence[torch.Tensor]],
    ) -> str:
        try:
            aside = Aside(positions, tensors, place)
        except OSError as error:
            return f"they can't be set aside: {error.strerror}"
        for index in range(len(tensors)):
            if problem := aside.fill(index, parts(index)):
                aside.close()
                return problem
        self.written_bytes += aside.written_bytes
        self.files.append(aside)
        return ""

    def reorder(self, order: torch.Tensor) -> None:
        """The batch is put in another order."""
        for aside in self.files:
            aside.reorder(order)

    def crop(self, length: int) -> None:
        """Positions from `length` on are gone."""
        for aside in self.files:
            aside.crop(length)

    def close(self) -> None:
        """Drop everything, also from the disk."""
        for aside in self.files:
            aside.close()
        self.files.clear()


def _absent(files: Sequence[Aside], positions: Positions) -> Positions:
    """Which of them none of `files` has."""
    for aside in files:
        positions = np.setdiff1d(positions, aside.positions, assume_unique=True)
    return positions


def _sources(files: Sequence[Aside], positions: Positions) -> list[tuple[Aside, Positions]]:
    found = []
    for aside in files:
        here = np.intersect1d(aside.positions, positions, assume_unique=True)
        positions = np.setdiff1d(positions, here, assume_unique=True)
        if len(here):
            found.append((aside, here))
    return found
