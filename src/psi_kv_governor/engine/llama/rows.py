"""The rows of the cache as memory: views for the store, and their return to the kernel."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import mmap
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from psi_kv_governor.engine.llama.cells import Cells, runs_of
from psi_kv_governor.engine.llama.native import Native, TensorInfo
from psi_kv_governor.errors import EngineError


class Tensor:
    """One K or V tensor of the cache: cell i is row i."""

    def __init__(self, info: TensorInfo) -> None:
        self.info = info
        self.name: str = info.name.decode()
        self.row_bytes: int = info.row_bytes
        self.n_rows: int = info.rows
        self.in_reach = bool(info.host and info.contiguous)
        """The rows can be read and returned: they are in this process, one row a cell."""

    @property
    def memory(self) -> npt.NDArray[np.uint8]:
        """The rows in place, shape (n_rows, row_bytes). Valid as long as the context is open."""
        buffer = (ctypes.c_uint8 * (self.n_rows * self.row_bytes)).from_address(self.info.base)
        return np.ctypeslib.as_array(buffer).reshape(self.n_rows, self.row_bytes)


class Rows:
    """All tensors of a cache whose rows share one cell map."""

    def __init__(self, native: Native, tensors: Iterable[Tensor]) -> None:
        self._native = native
        self.tensors = [tensor for tensor in tensors if tensor.in_reach]
        self._memory = [tensor.memory for tensor in self.tensors]
        self.cell_bytes = sum(tensor.row_bytes for tensor in self.tensors)
        """Bytes of one cell in all tensors that are in reach."""
        self._scratch = np.empty(0, dtype=np.uint8)

    @property
    def layout(self) -> str:
        """Fingerprint of names, types and row sizes: rows fit only into the same layout."""
        shape = [(t.name, t.info.type, t.row_bytes) for t in self.tensors]
        return hashlib.sha256(repr(shape).encode()).hexdigest()[:16]

    def are_in(self, saved: bytes, cell: int) -> bool:
        """Whether `saved`, one position's state as llama.cpp saves it, holds exactly the rows of `cell`."""
        offset = 0
        # llama.cpp saves the K of all layers first, then the V of all layers.
        for i in sorted(range(len(self.tensors)), key=lambda i: "v_l" in self.tensors[i].name):
            row = self._memory[i][cell].tobytes()
            found = saved.find(row, offset)
            if found < 0:
                return False
            offset = found + len(row)
        return True

    def chunks(self, cells: Cells, wanted: npt.NDArray[np.bool_] | None = None) -> Iterator[memoryview]:
        """The rows of `cells` in place, tensor by tensor, one memoryview a run of neighbouring cells.

        Cells that are not `wanted` get scratch memory instead of their rows: so a part of a blob can be
        read with the checksum of the whole.
        """
        wanted = np.ones(len(cells), dtype=np.bool_) if wanted is None else wanted
        neighbours = (np.diff(cells) == 1) | ~wanted[1:]
        breaks = np.flatnonzero(~neighbours | (wanted[1:] != wanted[:-1])) + 1
        edges = [0, *breaks.tolist(), len(cells)]
        runs = [(int(cells[a]), b - a, bool(wanted[a])) for a, b in itertools.pairwise(edges) if b > a]
        self._reserve_scratch(wanted)
        for memory in self._memory:
            for cell, length, keep in runs:
                n_bytes = length * memory.shape[1]
                yield memory[cell : cell + length].reshape(-1).data if keep else self._scratch[:n_bytes].data

    def _reserve_scratch(self, wanted: npt.NDArray[np.bool_]) -> None:
        skipped = runs_of(~wanted)
        longest = int((skipped[:, 1] - skipped[:, 0]).max(initial=0))
        n_bytes = longest * max(tensor.row_bytes for tensor in self.tensors)
        if len(self._scratch) < n_bytes:
            self._scratch = np.empty(n_bytes, dtype=np.uint8)

    @property
    def n_cells(self) -> int:
        """Cells of the cache."""
        return self.tensors[0].n_rows

    @property
    def smallest_row_bytes(self) -> int:
        """Bytes of the shortest row: the tensor with the most cells a page."""
        return min(tensor.row_bytes for tensor in self.tensors)

    def copy(self, cell: int) -> list[bytes]:
        """The rows of one cell, one a tensor."""
        return [memory[cell].tobytes() for memory in self._memory]

    def fill(self, cells: Cells, value: int) -> None:
        """Set every byte of the rows of `cells`. A masked cell must still hold finite numbers afterwards."""
        for memory in self._memory:
            memory[cells] = value

    def whole_pages(self, tensor: int, first: int, last: int) -> npt.NDArray[np.uint8]:
        """The bytes of cells [first, last) of one tensor that fill whole pages."""
        base, row_bytes = self.tensors[tensor].info.base, self.tensors[tensor].row_bytes
        page = mmap.PAGESIZE
        start = -(-(base + first * row_bytes) // page) * page - base
        stop = (base + last * row_bytes) // page * page - base
        return self._memory[tensor].reshape(-1)[start : max(start, stop)]

    def release(self, returnable: Cells) -> int:
        """Give the pages of `returnable` (see CellMap) back; returns resident bytes. Raises EngineError."""
        runs = returnable.ctypes.data_as(ctypes.POINTER(ctypes.c_int64))
        returned = 0
        for tensor in self.tensors:
            n_bytes = self._native.library.psikv_release(ctypes.byref(tensor.info), runs, len(returnable))
            if n_bytes < 0:
                raise EngineError("the kernel refused to take pages back (is the memory locked?)")
            returned += n_bytes
        return returned

    def return_all(self) -> int:
        """Return every page of an empty cache, and ask for no huge pages from now on: one would make 2 MiB
        resident for a row, and can't be returned in part. Gives the resident bytes that went."""
        for tensor in self.tensors:
            self._native.library.psikv_small_pages(ctypes.byref(tensor.info))
        return self.release(np.array([[0, self.n_cells, 0, self.n_cells]], dtype=np.int64))
