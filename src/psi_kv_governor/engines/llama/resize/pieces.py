"""Ranges of a sequence in files without a name, written and read by llama.cpp itself."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import llama_cpp

from psi_kv_governor.cache import Range, cells_in
from psi_kv_governor.errors import EngineError
from psi_kv_governor.residence.files import open_unlinked

SPARE = 1
"""The sequence by which ranges are copied out and in: a copy of bookkeeping, not of rows (kv_unified)."""


class Place(NamedTuple):
    """Where the files go."""

    folder: str
    reserve_bytes: int


class Piece:
    """Saved cells of sequence 0. `part` is what counts of them: its tail may have been cut since."""

    def __init__(self, part: Range, descriptor: int, n_bytes: int, *, masked: bool) -> None:
        self.part = part
        self.stored = part.cells
        """Cells in the file: all of them are read, whatever was cut since."""
        self.n_bytes = n_bytes
        self.masked = masked
        """Whether it stays out when the next token is decoded; else it comes back before."""
        self._descriptor = descriptor

    def close(self) -> None:
        """Give the file back. Safe to call twice."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()

    @property
    def path(self) -> bytes:
        """A name by which this process reaches the file."""
        return b"/proc/self/fd/%d" % self._descriptor

    def settle(self) -> None:
        """Have the disk hold it, and its pages leave the page cache. Where that fails, they stay."""
        try:
            os.fdatasync(self._descriptor)
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            return


def save(pointer: Any, parts: Sequence[Range], place: Place, *, masked: bool) -> Piece:
    """Copy `parts` of sequence 0 into a file; the context stays as it was. Raises EngineError."""
    memory = llama_cpp.llama_get_memory(pointer)
    try:
        descriptor = open_unlinked(place.folder)
    except OSError as error:
        raise EngineError(f"no file can be made in {place.folder}: {error.strerror}") from error
    piece = Piece(Range(parts[0].start, parts[-1].stop), descriptor, 0, masked=masked)
    piece.stored = cells_in(parts)
    for part in parts:
        llama_cpp.llama_memory_seq_cp(memory, 0, SPARE, part.start, part.stop)
    try:
        piece.n_bytes = llama_cpp.llama_state_seq_save_file(pointer, piece.path, SPARE, None, 0)
    finally:
        llama_cpp.llama_memory_seq_rm(memory, SPARE, -1, -1)
    if not piece.n_bytes:
        raise EngineError(f"{place.folder} can't hold what is given up: is the disk full?")
    return piece


def load(pointer: Any, piece: Piece) -> None:
    """Put the piece into the free cells of the context, behind what is there. Raises EngineError."""
    memory = llama_cpp.llama_get_memory(pointer)
    # With NULL for the tokens llama.cpp reads none of the cells, and calls it a success.
    tokens, n_tokens = (ctypes.c_int32 * 1)(), ctypes.c_size_t()
    n_bytes = llama_cpp.llama_state_seq_load_file(
        pointer, piece.path, SPARE, tokens, 1, ctypes.byref(n_tokens)
    )
    if n_bytes != piece.n_bytes:
        raise EngineError("what was given up can't be read back: the disk fails, or there are too few cells")
    llama_cpp.llama_memory_seq_cp(memory, SPARE, 0, piece.part.start, piece.part.stop)
    llama_cpp.llama_memory_seq_rm(memory, SPARE, -1, -1)


def check_space(place: Place, n_bytes: int) -> None:
    """Raises EngineError where `n_bytes` more don't fit beside the reserve."""
    try:
        disk = os.statvfs(place.folder)
    except OSError as error:
        raise EngineError(f"{place.folder} can't be read: {error.strerror}") from error
    free_bytes = disk.f_bavail * disk.f_frsize
    if free_bytes < n_bytes + place.reserve_bytes:
        raise EngineError(
            f"{place.folder} has {free_bytes / 1e6:,.0f} MB free: {n_bytes / 1e6:,.0f} MB and the reserve of "
            f"{place.reserve_bytes / 1e6:,.0f} MB don't fit"
        )
