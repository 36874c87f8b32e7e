"""Pages of a mapped file: out of memory, and in again."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from psi_kv_governor.kernel import memory
from psi_kv_governor.kernel.memory import PAGE_BYTES, Mask
from psi_kv_governor.residence.counting import in_memory
from psi_kv_governor.residence.parked_file import ParkedFile
from psi_kv_governor.residence.parts import Part, runs_of


def drop(address: int, file: ParkedFile, part: Part) -> None:
    """Write back, unmap and forget the pages of `part`: only unmapped ones can be forgotten, and only clean
    ones are. Raises OSError, with nothing dropped, where the disk could not take them."""
    start, n_bytes = part[0], part[1] - part[0]
    memory.write_back(file.descriptor, start, n_bytes)
    memory.advise(address + start, n_bytes, memory.DONTNEED)
    file.drop(*part)


def read_in(
    address: int, parts: Sequence[tuple[Part, ParkedFile]], buffer: ctypes.Array[ctypes.c_char]
) -> None:
    """Read exactly the pages of `parts`: readahead by fault brought 8 MiB where 1 was asked for.

    All are asked for before the first is waited for: in between the disk stood still.
    """
    for part, file in parts:
        file.read_in(*part)
    for (start, stop), _ in parts:
        memory.advise(address + start, stop - start, memory.RANDOM)
        try:
            memory.advise(address + start, stop - start, memory.POPULATE_READ)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            bytes(memoryview(buffer).cast("B")[start:stop:PAGE_BYTES])  # before Linux 5.14


def resident(address: int, run: Part, of: npt.NDArray[np.uint8]) -> list[Part]:
    """What of `run` is in memory although a file holds it; `of` is the file's number of each page, or 0."""
    mask, how = in_memory(address, run)
    if mask is None or how != "mincore" or not mask.any():
        return []
    return runs_of(mask & (of[run[0] // PAGE_BYTES : run[1] // PAGE_BYTES] != 0), run[0])


def missing(address: int, run: Part, of: npt.NDArray[np.uint8]) -> tuple[Mask, str]:
    """By page, what of `run` a file holds and memory does not; and by what that was counted."""
    mask, how = in_memory(address, run)
    held: Mask = of[run[0] // PAGE_BYTES : run[1] // PAGE_BYTES] != 0
    return (held if mask is None else held & ~mask), how
