"""Rows that were taken out of a cache, parked in a file of their own until they are wanted again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from psi_kv_governor.cache import Range
from psi_kv_governor.engines.transformers.places import Positions
from psi_kv_governor.engines.transformers.rows import Rows
from psi_kv_governor.kernel.memory import PAGE_BYTES
from psi_kv_governor.residence import Mapping, Place


class Aside:
    """The rows of some positions in all layers: each tensor's part begins on a page of its own."""

    def __init__(self, ranges: Sequence[Range], tensors: Sequence[Rows], place: Place) -> None:
        """Make room for the rows of `ranges`. Raises OSError when there is no address space."""
        self.positions: Positions = np.concatenate(
            [np.arange(part.start, part.stop, dtype=np.int64) for part in ranges]
        )
        self.order: torch.Tensor | None = None
        """The batch was put in another order since: member i is what `order[i]` was. None: it was not."""
        self._shapes = [(rows.shape, rows.dtype) for rows in tensors]
        self._sizes = [len(self.positions) * rows.row_bytes for rows in tensors]
        starts = np.cumsum([0, *(-(-size // PAGE_BYTES) * PAGE_BYTES for size in self._sizes)])
        self._starts = [int(start) for start in starts]
        self.mapping = Mapping(self._starts[-1], place=place)
        self.written_bytes = 0

    def fill(self, index: int, rows: Rows, runs: Sequence[Range]) -> str:
        """Copy rows `runs` of tensor number `index` here and park them. Gives what went wrong, or ''."""
        into = self._tensor(index)
        at = 0
        for run in runs:
            into[:, :, at : at + run.cells].copy_(rows.at(run.start, run.stop))
            at += run.cells
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
