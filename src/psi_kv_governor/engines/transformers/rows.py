"""The rows of one tensor (K or V of a layer) in a mapping: packed lane by lane, read in place."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from psi_kv_governor.cache import Range
from psi_kv_governor.kernel.memory import PAGE_BYTES
from psi_kv_governor.residence import Backing, Mapping, Part, Place

_COPY_BYTES = 16 << 20  # of rows that are put in another order at once


class Rows:
    """Rows 0, 1, ... of each *lane* (one head of one member of the batch), one lane after the other.

    Attention reads a view of shape [batch, heads, rows, head_dim], as of any cache of transformers, and
    nothing is copied a step. Lanes, and not whole tokens, lie together: with 2 KiB from one row of a head
    to the next, attention in bf16 over 8 heads of 128 took 1.8 times as long as stock (one thread, 2,048 to
    8,192 rows), with lanes 0.82 to 0.97. The price is a part of a page a lane. Nothing here is locked: the
    cache sees to it.
    """

    def __init__(self, sample: torch.Tensor, capacity: int, backing: Backing, place: Place | None) -> None:
        """Rows for states like `sample` [batch, heads, any, head_dim]."""
        batch, heads, _, width = sample.shape
        self.shape = (int(batch), int(heads), int(width))
        self.dtype = sample.dtype
        self.piece_bytes = int(width) * int(sample.element_size())
        """Bytes of a row in one lane: what lies together."""
        self.used = 0
        """Rows that were written since the last release: those above hold nothing."""
        self._backing, self._place = backing, place
        self.mapping, self._lanes = self._new(capacity)

    def _new(self, capacity: int) -> tuple[Mapping, torch.Tensor]:
        # Each lane begins on a page.
        lane_bytes = -(-max(1, capacity) * self.piece_bytes // PAGE_BYTES) * PAGE_BYTES
        while lane_bytes % self.piece_bytes:
            lane_bytes += PAGE_BYTES
        n_bytes = lane_bytes * self.lanes
        mapping = Mapping(n_bytes, backing=self._backing, place=self._place)
        flat = torch.frombuffer(mapping.buffer, dtype=self.dtype, count=n_bytes // self.dtype.itemsize)
        return mapping, flat.view(self.shape[0], self.shape[1], -1, self.shape[2])

    @property
    def lanes(self) -> int:
        """Heads of all members of the batch."""
        batch, heads, _ = self.shape
        return int(batch) * int(heads)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in all lanes."""
        return self.lanes * self.piece_bytes

    @property
    def capacity(self) -> int:
        """Rows that fit."""
        return int(self._lanes.shape[2])

    def view(self, n_rows: int) -> torch.Tensor:
        """The first rows as [batch, heads, n_rows, head_dim]."""
        return self._lanes[:, :, :n_rows]

    def at(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop`: [batch, heads, rows, head_dim]."""
        return self._lanes[:, :, start:stop]

    def append(self, n_rows: int, states: torch.Tensor) -> None:
        """Put `states` [batch, heads, new, head_dim] after the first `n_rows`."""
        stop = n_rows + states.shape[-2]
        self.make_room(n_rows, stop)
        self._lanes[:, :, n_rows:stop].copy_(states)
        self.used = max(self.used, stop)

    def make_room(self, n_rows: int, wanted: int) -> None:
        """Have room for `wanted` rows, keeping the first `n_rows`: at least twice what there was."""
        if wanted <= self.capacity:
            return
        old, kept = self.mapping, self.view(n_rows)
        self.mapping, self._lanes = self._new(max(wanted, 2 * self.capacity))
        self.view(n_rows).copy_(kept)
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
        if stop <= start or to == start:
            return
        size = self.piece_bytes
        for lane in self._lane_starts():
            base = self.mapping.address + lane
            ctypes.memmove(base + to * size, base + start * size, (stop - start) * size)

    def reorder(self, n_rows: int, order: torch.Tensor) -> None:
        """Exchange the batch's members: member i is what `order[i]` was."""
        for start, stop in self._spans(n_rows):
            part = self.at(start, stop)
            part.copy_(part.index_select(0, order))

    def with_members(self, n_rows: int, order: torch.Tensor) -> Rows:
        """The same rows with other members of the batch, in a mapping of their own."""
        sample = torch.empty((len(order), self.shape[1], 0, self.shape[2]), dtype=self.dtype)
        other = Rows(sample, self.capacity, self._backing, self._place)
        for start, stop in self._spans(n_rows):
            other.at(start, stop).copy_(self.at(start, stop).index_select(0, order))
        other.used = n_rows
        return other

    def _spans(self, n_rows: int) -> list[tuple[int, int]]:
        step = max(1, _COPY_BYTES // self.row_bytes)
        return [(start, min(n_rows, start + step)) for start in range(0, n_rows, step)]

    def release(self, n_rows: int) -> int:
        """Return the pages above the first `n_rows`. Gives the bytes that the system has again."""
        if self.used <= n_rows:
            return 0
        done = self.mapping.release(self.parts(n_rows))
        self.used = n_rows
        return done.bytes_returned

    def expect(self) -> None:
        """The rows are read soon."""
        self.mapping.expect(self.parts())

    def bring_back(self) -> None:
        """Have what is parked in memory before it is read: attention would wait for the disk page by page."""
        self.mapping.unpark(self.parts())

    def parts(self, first: int = 0) -> list[Part]:
        """The bytes of rows `first` and on that were written, to the end of their last pages."""
        stop = -(-self.used * self.piece_bytes // PAGE_BYTES) * PAGE_BYTES
        start = first * self.piece_bytes
        return [(lane + start, lane + stop) for lane in self._lane_starts() if start < stop]

    @property
    def lane_addresses(self) -> list[int]:
        """Where row 0 of each lane lies: head by head of the first member, then of the next."""
        return [self.mapping.address + start for start in self._lane_starts()]

    def _lane_starts(self) -> range:
        return range(0, self.mapping.n_bytes, self.capacity * self.piece_bytes)

    def close(self) -> None:
        """Give everything back."""
        self.mapping.close()
