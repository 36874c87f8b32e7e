"""The tap of one context: which tensors its cache has, and which cells the last decode wrote."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from psi_kv_governor.engine.llama.cells import Cells
from psi_kv_governor.engine.llama.native import Native, TensorInfo
from psi_kv_governor.engine.llama.rows import Tensor

_PROBLEMS = {
    1: "the cell indices are not in this process's memory",
    2: "the graph has more cache tensors than expected",
}


class Counters(ctypes.Structure):
    """The head of `struct psikv_tap`, read in place: a call into the library costs more than the look."""

    _fields_ = (
        ("log_count", ctypes.c_int64),
        ("problem", ctypes.c_int32),
        ("interrupt", ctypes.c_int32),
        ("interruptible", ctypes.c_int32),
    )


class Tap:
    """Owns one `struct psikv_tap`, which llama.cpp fills through `cb_eval` while a graph runs."""

    def __init__(self, native: Native) -> None:
        self.native = native
        self._tap: int | None = native.library.psikv_tap_new()
        if self._tap is None:
            raise MemoryError("no memory for the tap")
        self.counters = Counters.from_address(self._tap)
        self.log: Cells = np.empty(0, dtype=np.int64)
        """The cell indices in place; the first `counters.log_count` are of the decodes since `clear`."""

    def reserve(self, n_cells: int) -> None:
        """Make room for the indices of a cache of `n_cells`. Call before the first decode."""
        # Twice the cache: a failed decode may have logged its cells before it is run again.
        if not self.native.library.psikv_tap_reserve(self._tap, 2 * n_cells):
            raise MemoryError("no memory for the tap's log")
        log = self.native.library.psikv_tap_log(self._tap)
        self.log = np.ctypeslib.as_array(log, shape=(2 * n_cells,))

    @property
    def user_data(self) -> int | None:
        """What goes into `llama_context_params.cb_eval_user_data`."""
        return self._tap

    def interrupt(self, wanted: bool) -> None:
        """Whether a decode that can be run again is to end before its next node."""
        self.counters.interrupt = wanted

    def problem(self) -> str:
        """Why the tap can't be trusted, or ''."""
        return _PROBLEMS.get(self.counters.problem, "")

    def lead_and_tensors(self) -> list[Tensor]:
        """The tensors of the largest cache seen, whose cells are the ones logged from now on.

        A sliding-window model has two caches with cells of their own; the large one holds every position.
        """
        seen = self._infos()
        keys = [i for i, info in enumerate(seen) if b"k_l" in info.name]
        if not keys:
            return []
        leader = max(keys, key=lambda i: seen[i].rows)
        self.native.library.psikv_tap_lead(self._tap, leader)
        layers = {
            seen[i].name.rpartition(b"_l")[2]
            for i in keys
            if seen[i].index_source == seen[leader].index_source
        }
        return [Tensor(info) for info in seen if info.name.rpartition(b"_l")[2] in layers]

    def layers_of(self, letter: str) -> set[str]:
        """Numbers of the layers that have a cache tensor for `letter`: k or v."""
        marker = f"{letter}_l".encode()
        return {info.name.rpartition(b"_l")[2].decode() for info in self._infos() if marker in info.name}

    def sample(self, names: Sequence[str], n_cells: int, every: int, window: int, keep: float) -> int:
        """Sample attention in the layers whose keys are called `names`; gives the native sampler.

        Not while a token is decoded. Raises MemoryError.
        """
        library = self.native.library
        sampler: int | None = library.psikv_sampler_new(n_cells, every, window, keep)
        if sampler is None:
            raise MemoryError("no memory for sampling attention")
        library.psikv_tap_sample(self._tap, sampler)
        self.sample_layers(names)
        return sampler

    def sample_layers(self, names: Sequence[str]) -> None:
        """Sample from now on in the layers whose keys are called `names`, and in no other."""
        for i, info in enumerate(self._infos()):
            self.native.library.psikv_tap_sample_layer(self._tap, i, info.name.decode() in names)

    def _infos(self) -> list[TensorInfo]:
        library = self.native.library
        return [
            TensorInfo.from_buffer_copy(library.psikv_tap_tensor(self._tap, i).contents)
            for i in range(library.psikv_tap_n_tensors(self._tap))
        ]

    def n_caches(self) -> int:
        """Number of separate key caches that the newest graph wrote to."""
        return len({info.index_source for info in self._infos() if b"k_l" in info.name})

    def cells(self) -> Cells:
        """Cells written since the last `clear`, in the order of their tokens (a copy)."""
        count = int(self.counters.log_count)
        return np.array(self.log[:count], dtype=np.int64)

    def clear(self) -> None:
        """Forget the cells written so far."""
        self.counters.log_count = 0
        self.counters.problem = 0  # what is wrong for good shows again in the next graph

    def close(self) -> None:
        """Free it, after the context that fills it. Safe to call twice."""
        if self._tap is not None:
            self.native.library.psikv_tap_free(self._tap)
            self._tap = None
