"""Summaries of keys for recall: four bits a value, made and multiplied by the same code for each engine."""

from __future__ import annotations

import ctypes
import functools
from typing import Literal

import numpy as np
import numpy.typing as npt

from psi_kv_governor.errors import EngineError
from psi_kv_governor.native.building import agent_path

KeyType = Literal["float32", "float16", "bfloat16"]
KEY_TYPES: dict[KeyType, int] = {"float32": 0, "float16": 1, "bfloat16": 30}
"""By the names that numpy and torch use: the numbers of ggml."""

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class Summarizer:
    """Of keys of one type and width."""

    def __init__(self, kind: str, dim: int) -> None:
        """Raises EngineError where there is no native part, or no summary of such keys."""
        self._library = _library()
        self._type = {str(name): number for name, number in KEY_TYPES.items()}.get(kind, -1)
        self.dim = dim
        self.head_bytes = int(self._library.psikv_summary_bytes(self._type, dim))
        """Of a summary: one head of one cell."""
        if not self.head_bytes:
            raise EngineError(f"keys of {dim} values in {kind} can't be summarised")

    def make(self, address: int, row_bytes: int, rows: int) -> Bytes:
        """Summaries of `rows` keys that lie `row_bytes` apart from `address` on: (rows, head_bytes)."""
        made = np.empty((rows, self.head_bytes), dtype=np.uint8)
        self._library.psikv_summaries_make(
            made.ctypes.data, self.head_bytes, self._type, address, row_bytes, rows, self.dim
        )
        return made

    def dots(self, queries: Floats, summaries: Bytes) -> Floats:
        """Products of `queries` (n, dim) with the keys of `summaries` (cells, head_bytes): (n, cells)."""
        queries, summaries = np.ascontiguousarray(queries, np.float32), np.ascontiguousarray(summaries)
        if queries.shape[1:] != (self.dim,) or summaries.shape[1:] != (self.head_bytes,):
            raise ValueError("queries or summaries of another width")
        found = np.empty((len(queries), len(summaries)), dtype=np.float32)
        self._library.psikv_summaries_dots(
            found.ctypes.data, queries.ctypes.data, len(queries), summaries.ctypes.data, self.head_bytes,
            len(summaries), self.dim,
        )  # fmt: skip
        return found


def prepare() -> None:
    """Have the native part ready, compiled now if need be. Raises EngineError."""
    _library()


@functools.cache
def _library() -> ctypes.CDLL:
    """The native part, compiled now if need be; it stands before nobody's functions. Raises EngineError."""
    path = agent_path()
    try:
        library = ctypes.CDLL(str(path))
        pointer, number, width = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        library.psikv_summary_bytes.restype = number
        library.psikv_summary_bytes.argtypes = (width, number)
        library.psikv_summaries_make.restype = None
        library.psikv_summaries_make.argtypes = (pointer, number, width, pointer, number, number, number)
        library.psikv_summaries_dots.restype = None
        library.psikv_summaries_dots.argtypes = (pointer, pointer, number, pointer, number, number, number)
    except (OSError, AttributeError) as error:
        raise EngineError(f"the native part can't be loaded: {error}") from error
    return library
