"""What llama.cpp's cache can tell a policy: keys read in place, and attention sampled while decoding."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from psi_kv_governor.engine.llama.cells import CellMap, Cells
from psi_kv_governor.engine.llama.native import TensorInfo
from psi_kv_governor.engine.llama.rows import Rows
from psi_kv_governor.engine.llama.sampler import Sampled, Sampler, Sampling
from psi_kv_governor.engine.llama.tap import Tap
from psi_kv_governor.errors import EngineError
from psi_kv_governor.ledger import LIVE, SPILLED
from psi_kv_governor.policy.base import Kind, Range, Values

_NAMES = {
    value: name.removeprefix("GGML_TYPE_").lower()
    for name, value in vars(llama_cpp).items()
    if name.startswith("GGML_TYPE_") and isinstance(value, int)
}
_READABLE = ("f32", "f16", "bf16", "q8_0")
"""Types whose values values.h can read."""
_POOL = 5
"""Neighbours over which attention is averaged (SnapKV, arXiv 2404.14469): a fact is more than the one token
that a query lands on."""

_Floats = npt.NDArray[np.float32]


class LlamaEvidence:
    """An `Evidence` about the sequence of one context. Needs no safe point: live rows do not change."""

    def __init__(self, tap: Tap, rows: Rows, cell_map: CellMap) -> None:
        self._tap = tap
        self._map = cell_map
        self._keys = [tensor for tensor in rows.tensors if tensor.name.startswith("cache_k_l")]
        self._why_no_keys = _why_no_keys([tensor.info for tensor in self._keys], tap.layers_of("v"))
        self._why_no_attention = self._why_no_keys or _why_no_attention([t.info for t in self._keys])
        self._sampler: Sampler | None = None
        self._lock = threading.Lock()  # of the two buffers: the governor's loop and a trim by hand may meet
        self._out: _Floats = np.empty(0, dtype=np.float32)
        self._scratch: _Floats = np.empty(0, dtype=np.float32)

    def why_not(self, kind: Kind) -> str:
        """Why evidence of this kind can't be had from this cache; '' where it can."""
        if kind in {"key_norms", "key_diffs"}:
            return self._why_no_keys
        return self._why_no_attention if kind in {"attention", "last_used"} else ""

    def collect(self, kinds: frozenset[Kind], sampling: Sampling | None = None) -> None:
        """Sample attention from now on if any of `kinds` needs it; and reserve what scoring needs.

        Kinds that can't be had are left out.
        """
        kinds = frozenset(kind for kind in kinds if not self.why_not(kind))
        n_cells = self._map.ledger.capacity
        if kinds & {"key_norms", "key_diffs"}:
            self._out, self._scratch = np.empty((2, n_cells), dtype=np.float32)
        if kinds & {"attention", "last_used"}:
            names = [tensor.name for tensor in self._keys]
            self._sampler = Sampler(self._tap, names, self._keys[0].n_rows, sampling or Sampling())

    def emptied(self) -> None:
        """The cache is empty."""
        if self._sampler is not None:
            self._sampler.forget()

    def snapshot(self) -> Sampled | None:
        """All that was sampled so far; None where nothing is."""
        return self._sampler.snapshot() if self._sampler is not None else None

    def rewind(self, sampled: Sampled | None) -> None:
        """Forget what was sampled after `snapshot`: for measurements that try one thing after another from
        the same beginning. At a safe point only."""
        if self._sampler is not None and sampled is not None:
            self._sampler.rewind(sampled)

    def arrivals(self, part: Range) -> Values:
        """See Evidence."""
        return self._map.ledger.arrivals(part)

    def key_norms(self, part: Range) -> Values:
        """See Evidence. Reads every live key once."""
        return self._of_keys(part, cosine=False)

    def key_diffs(self, part: Range) -> Values:
        """See Evidence. Reads every live key twice."""
        return -self._of_keys(part, cosine=True)

    def attention(self, part: Range) -> Values:
        """See Evidence. Averaged over five neighbours; a spilled position keeps what it had.

        Raises EngineError when the graphs were not as expected, and nothing could be sampled.
        """
        sampler = self._working_sampler()
        if sampler is None:
            return np.full(part.cells, np.nan)
        reach = _POOL // 2
        wide = Range(max(0, part.start - reach), min(part.stop + reach, len(self._map.ledger)))
        pooled = _pooled(self._placed(wide, sampler.attention))
        return pooled[part.start - wide.start :][: part.cells]

    def last_used(self, part: Range) -> Values:
        """See Evidence. Raises EngineError as `attention` does."""
        sampler = self._working_sampler()
        return self._placed(part, sampler.last_used) if sampler else np.full(part.cells, np.nan)

    def _working_sampler(self) -> Sampler | None:
        if self._sampler is not None and self._sampler.failed:
            raise EngineError("this model's attention was not as expected, and none was sampled")
        return self._sampler

    def _placed(self, part: Range, of_cells: Callable[[Cells], Values]) -> Values:
        """What `of_cells` gives for the cells of `part`; NaN where a position has no cell."""
        values = np.full(part.cells, np.nan)
        for place in (LIVE, SPILLED):
            for run in self._map.ledger.ranges(place, part):
                values[run.start - part.start : run.stop - part.start] = of_cells(self._map.cells(run))
        return values

    def _of_keys(self, part: Range, *, cosine: bool) -> Values:
        """Mean score over the layers of each live position; NaN for the others."""
        live = [run for run in self._map.ledger.ranges(LIVE) if run.cells]
        values = np.full(part.cells, np.nan)
        if not live:
            return values
        positions = np.concatenate([np.arange(run.start, run.stop) for run in live])
        cells = np.concatenate([self._map.cells(run) for run in live])  # a copy: decoding goes on meanwhile
        placed = cells >= 0  # the newest positions may not have their cell yet
        positions, cells = positions[placed], cells[placed]
        with self._lock:
            scores = self._scores(cells, cosine)
        wanted = (positions >= part.start) & (positions < part.stop)
        values[positions[wanted] - part.start] = scores[wanted]
        return values

    def _scores(self, cells: Cells, cosine: bool) -> Values:
        n = len(cells)
        if len(self._out) < n:
            self._out, self._scratch = np.empty((2, n), dtype=np.float32)
        self._out[:n] = 0.0
        for tensor in self._keys:
            self._tap.native.library.psikv_score_keys(  # without the interpreter's lock, as every ctypes call
                ctypes.byref(tensor.info), cosine, _pointer(cells, ctypes.c_int64), n,
                _pointer(self._out, ctypes.c_float), _pointer(self._scratch, ctypes.c_float),
            )  # fmt: skip
        scores: Values = self._out[:n] / np.float64(len(self._keys))
        return scores


def _pointer(array: npt.NDArray[Any], kind: type[ctypes.c_int64 | ctypes.c_float]) -> object:
    return array.ctypes.data_as(ctypes.POINTER(kind))


def _why_no_keys(keys: list[TensorInfo], layers_with_values: set[str]) -> str:
    if not keys:
        return "its keys are not in this process's memory"
    types = {_NAMES.get(info.type, f"type {info.type}") for info in keys}
    if unread := sorted(types - set(_READABLE)):
        return f"its keys are {unread[0]}, and only {', '.join(_READABLE)} can be read (type_k)"
    if not layers_with_values:
        return "it keeps a compressed form of keys and values (MLA)"
    if any(info.head_dim <= 0 for info in keys):
        return "the graph does not tell where a head's key begins"
    return ""


def _why_no_attention(keys: list[TensorInfo]) -> str:
    if not any(info.n_head for info in keys):
        return "attention can be sampled only with flash attention on"
    if any(info.alibi for info in keys):
        return "its attention has a slope by distance (ALiBi), which sampling does not follow"
    return ""


def _pooled(values: Values) -> Values:
    """Mean over _POOL neighbours, of those that are known; NaN stays where nothing is known itself."""
    if not len(values):
        return values
    known = ~np.isnan(values)
    total, count = (
        np.convolve(what, np.ones(_POOL))[_POOL // 2 :][: len(values)]
        for what in (np.where(known, values, 0.0), known.astype(np.float64))
    )
    return np.where(known, total / np.maximum(count, 1.0), np.nan)
