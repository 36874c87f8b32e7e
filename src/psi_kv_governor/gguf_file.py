"""Just enough of the GGUF format to know that a file is a model and is whole.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Standard library only, so that the
download script works from a bare checkout.
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from psi_kv_governor.errors import BadInputError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # version 1 is from before August 2023, and llama.cpp no longer reads it
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_COUNTS = struct.Struct("<QQ")
_STRING, _ARRAY = 8, 9
_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_DEPTH = 4  # arrays of arrays are allowed, and deeper ones than this exist in no model
_DIMENSIONS = 4
_ALIGNMENT = 32

TENSOR_TYPES = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 16: (256, 66),
    17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56),
    30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18),
}  # fmt: skip
"""ggml_type -> (elements of a block, bytes of a block), for the types that files hold (ggml.c)."""


@dataclass(frozen=True)
class GgufFile:
    """What the head of a model file says."""

    path: Path
    size_bytes: int
    version: int
    architecture: str
    """`general.architecture`; empty when the file has none."""
    tensors: int


def read_gguf(path: Path) -> GgufFile:
    """Read the head of `path` and check that all tensors lie inside the file.

    Raises BadInputError, with one line, when there is no such file, when it is not a GGUF model, and when
    it ends too early.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadInputError(f"{path} is not a file: give the path of a GGUF model")
        with path.open("rb") as file:
            return _Reader(file, path).read()
    except FileNotFoundError as error:
        raise BadInputError(f"there is no model {path}: `psi-kv model fetch` gets the demo model") from error
    except OSError as error:
        raise BadInputError(f"the model {path} cannot be read: {error.strerror}") from error


class _Reader:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._size = os.fstat(file.fileno()).st_size

    def read(self) -> GgufFile:
        version = self._version()
        n_tensors, n_values = _COUNTS.unpack(self._take(_COUNTS.size))
        architecture, alignment = "", _ALIGNMENT
        for _ in range(n_values):
            key = self._string()
            kind = self._u32()
            if key == b"general.architecture" and kind == _STRING:
                architecture = self._string().decode(errors="replace")
            elif key == b"general.alignment" and kind == 4:
                alignment = self._u32()
            else:
                self._skip_value(kind)
        if alignment == 0:
            raise BadInputError(f"{self._path} is not a usable GGUF model: its alignment is 0")
        end = max((self._tensor_end() for _ in range(n_tensors)), default=0)
        start = -(-self._file.tell() // alignment) * alignment
        if end and start + end > self._size:
            raise self._truncated(f"its tensors need {start + end} bytes, and it has {self._size}")
        return GgufFile(self._path, self._size, version, architecture, n_tensors)

    def _version(self) -> int:
        head = self._file.read(8)
        if not _MAGIC.startswith(head[:4]) or not head:
            raise BadInputError(f"{self._path} is not a GGUF model: it does not begin with GGUF")
        if len(head) < 8:
            raise self._truncated("it ends in its first 8 bytes")
        version = int(_U32.unpack(head[4:])[0])
        if version not in _VERSIONS:
            other = "of the other byte order" if version & 0xFFFF == 0 else f"of GGUF version {version}"
            raise BadInputError(f"{self._path} is {other}: convert it again with a current llama.cpp")
        return version

    def _tensor_end(self) -> int:
        """Reads one tensor's description; gives the end of its data, counted from the data's start."""
        name = self._string()
        n_dimensions = self._u32()
        if n_dimensions > _DIMENSIONS:
            raise BadInputError(f"{self._path} is damaged: tensor {name!r} has {n_dimensions} dimensions")
        elements = 1
        for _ in range(n_dimensions):
            elements *= self._u64()
        block_elements, block_bytes = TENSOR_TYPES.get(self._u32(), (1, 0))  # a new type: only its offset
        return self._u64() + elements // block_elements * block_bytes

    def _skip_value(self, kind: int, depth: int = 0) -> None:
        if kind == _STRING:
            self._skip(self._u64())
        elif kind == _ARRAY and depth < _DEPTH:
            item, count = self._u32(), self._u64()
            if item in _VALUE_BYTES:
                self._skip(count * _VALUE_BYTES[item])
                return
            for _ in range(count):
                self._skip_value(item, depth + 1)
        elif kind in _VALUE_BYTES:
            self._skip(_VALUE_BYTES[kind])
        else:
            raise BadInputError(f"{self._path} is damaged: it holds a value of the unknown kind {kind}")

    def _string(self) -> bytes:
        return self._take(self._u64())

    def _u32(self) -> int:
        return int(_U32.unpack(self._take(4))[0])

    def _u64(self) -> int:
        return int(_U64.unpack(self._take(8))[0])

    def _take(self, n_bytes: int) -> bytes:
        # A wrong length is told from the file's size before anything of that length is asked for.
        if n_bytes > self._size:
            raise self._truncated(f"a part of {n_bytes} bytes is announced, and it has {self._size}")
        data = self._file.read(n_bytes)
        if len(data) != n_bytes:
            raise self._truncated("it ends in the middle of its head")
        return data

    def _skip(self, n_bytes: int) -> None:
        if n_bytes > self._size - self._file.tell():
            raise self._truncated("it ends in the middle of its head")
        self._file.seek(n_bytes, os.SEEK_CUR)

    def _truncated(self, how: str) -> BadInputError:
        return BadInputError(f"the model {self._path} is truncated or damaged: {how}; download it again")
