"""The rows of one tensor (K or V of a layer): token-major in a mapping, read in place."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from psi_kv_governor.cache import Range
from psi_kv_governor.kernel.memory import PAGE_BYTES
from psi_kv_governor.residence import Backing, Mapping, Place

_COPY_BYTES = 16 << 20  # of rows that are put in another order at once


class Rows:
    """Rows 0, 1, ... of shape [batch, heads, head_dim] in one mapping, which grows by copying.

    Attention reads a view of shape [batch, heads, rows, head_dim], as of any cache of transformers: nothing
    is copied a step. Nothing here is locked: the cache sees to it.
    """

    def __init__(self, sample: torch.Tensor, capacity: int, backing: Backing, place: Place | None) -> None:
        batch, heads, _, width = sample.shape
        self.shape = (int(batch), int(heads), int(width))
        self.dtype = sample.dtype
        self.row_bytes = self.shape[0] * self.shape[1] * self.shape[2] * sample.element_size()
        self.used = 0
        """Rows that were written since the last release: those above hold nothing."""
        self._backing, self._place = backing, place
        self.mapping, self._flat = self._new(capacity)

    def _new(self, capacity: int) -> tuple[Mapping, torch.Tensor]:
        mapping = Mapping(max(1, capacity) * self.row_bytes, backing=self._backing, place=self._place)
        count = max(1, capacity) * self.row_bytes // self.dtype.itemsize
        flat = torch.frombuffer(mapping.buffer, dtype=self.dtype, count=count)
        return mapping, flat.view(-1, *self.shape)

    @property
    def capacity(self) -> int:
        """Rows that fit."""
        return int(self._flat.shape[0])

    def view(self, n_rows: int) -> torch.Tensor:
        """The first rows as [batch, heads, n_rows, head_dim]."""
        return self._flat[:n_rows].permute(1, 2, 0, 3)

    def at(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` as they are stored: [rows, batch, heads, head_dim]."""
        return self._flat[start:stop]

    def append(self, n_rows: int, states: torch.Tensor) -> None:
        """Put `states` [batch, heads, new, head_dim] after the first `n_rows`."""
        stop = n_rows + states.shape[-2]
        self.make_room(n_rows, stop)
        self._flat[n_rows:stop].copy_(states.permute(2, 0, 1, 3))
        self.used = max(self.used, stop)

    def make_room(self, n_rows: int, wanted: int) -> None:
        """Have room for `wanted` rows, keeping the first `n_rows`: at least twice what there was."""
        if wanted <= self.capacity:
            return
        old, kept = self.mapping, self._flat[:n_rows]
        self.mapping, self._flat = self._new(max(wanted, 2 * self.capacity))
        self._flat[:n_rows].copy_(kept)
        self.used = n_rows
        old.close()

    def close_up(self, n_rows: int, gaps: Sequence[Range]) -> None:
        """Take the rows of `gaps` (sorted) out of the first `n_rows`: those after them move down."""
        to = gaps[0].start
        for gap, after in zip(gaps, [*(gap.start for gap in gaps[1:]), n_rows], strict=True):
            self._move(gap.stop, after, to)
            to += after - gap.stop

    def open_up(self, n_rows: int, gaps: Sequence[Range]) -> None:
        """Make room for the rows of `gaps`, as they are numbered afterwards; the opposite of `close_up`."""
        total = n_rows + sum(gap.cells for gap in gaps)
        self.make_room(n_rows, total)
        stop, shift = total, total - n_rows
        for gap in reversed(gaps):
            self._move(gap.stop - shift, stop - shift, gap.stop)
            stop, shift = gap.start, shift - gap.cells
        self.used = max(self.used, total)

    def _move(self, start: int, stop: int, to: int) -> None:
        if stop > start and to != start:
            base, size = self.mapping.address, self.row_bytes
            ctypes.memmove(base + to * size, base + start * size, (stop - start) * size)

    def reorder(self, n_rows: int, order: torch.Tensor) -> None:
        """Exchange the batch's members: member i is what `order[i]` was."""
        step = max(1, _COPY_BYTES // self.row_bytes)
        for start in range(0, n_rows, step):
            part = self._flat[start : min(n_rows, start + step)]
            part.copy_(part.index_select(1, order))

    def with_members(self, n_rows: int, order: torch.Tensor) -> Rows:
        """The same rows with other members of the batch, in a mapping of their own."""
        sample: Any = torch.empty((len(order), self.shape[1], 0, self.shape[2]), dtype=self.dtype)
        other = Rows(sample, self.capacity, self._backing, self._place)
        step = max(1, _COPY_BYTES // other.row_bytes)
        for start in range(0, n_rows, step):
            stop = min(n_rows, start + step)
            other._flat[start:stop].copy_(self._flat[start:stop].index_select(1, order))
        other.used = n_rows
        return other

    def release(self, n_rows: int) -> int:
        """Return the pages above the first `n_rows`. Gives the bytes that the system has again."""
        if self.used <= n_rows:
            return 0
        done = self.mapping.release([(n_rows * self.row_bytes, self.part[1])])
        self.used = n_rows
        return done.bytes_returned

    @property
    def part(self) -> tuple[int, int]:
        """The bytes of all rows that were written, in whole pages: nothing else lies there."""
        return 0, min(self.mapping.n_bytes, -(-self.used * self.row_bytes // PAGE_BYTES) * PAGE_BYTES)

    def close(self) -> None:
        """Give everything back."""
        self.mapping.close()
