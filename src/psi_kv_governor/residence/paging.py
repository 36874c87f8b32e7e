"""Pages of a mapped file: out of memory, and in again."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from psi_kv_governor.kernel import memory
from psi_kv_governor.kernel.memory import PAGE_BYTES, Mask
from psi_kv_governor.residence.counting import in_memory
from psi_kv_governor.residence.parked_file import ParkedFile
from psi_kv_governor.residence.parts import Part, bytes_of, runs_of


def no_read_ahead(address: int, n_bytes: int) -> None:
    """Have faults there read no more than their page: they brought 8 MiB where 1 was asked for, and in large
    folios, of which no part can go. Where all goes as one it is not called: by pages it costs an eighth more.
    """
    with contextlib.suppress(OSError):
        memory.advise(address, n_bytes, memory.RANDOM)


def drop(address: int, file: ParkedFile, part: Part) -> None:
    """Write back, unmap and forget the pages of `part`: only unmapped ones can be forgotten, and only clean
    ones are. Raises OSError, with nothing dropped, where the disk could not take them."""
    start, n_bytes = part[0], part[1] - part[0]
    memory.write_back(file.descriptor, start, n_bytes)
    memory.advise(address + start, n_bytes, memory.DONTNEED)
    file.drop(*part)


def ask_for(parts: Iterable[tuple[Part, ParkedFile]]) -> None:
    """Have the disk begin to read the pages of `parts`, and no more."""
    for part, file in parts:
        file.read_in(*part)


def read_in(
    address: int, parts: Sequence[tuple[Part, ParkedFile]], buffer: ctypes.Array[ctypes.c_char]
) -> None:
    """Read the pages of `parts`, and no more. All are asked for before the first is waited for: in between
    the disk stood still."""
    ask_for(parts)
    for (start, stop), _ in parts:
        no_read_ahead(address + start, stop - start)
        try:
            memory.advise(address + start, stop - start, memory.POPULATE_READ)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            bytes(memoryview(buffer).cast("B")[start:stop:PAGE_BYTES])  # before Linux 5.14


def drop_stragglers(
    address: int, runs: Iterable[Part], of: npt.NDArray[np.uint8], drop: Callable[[int, int], None]
) -> None:
    """Drop what is still in memory: pages that somebody's readahead was just bringing in could not go yet."""
    for _ in range(3):
        left = [part for run in runs for part in _resident(address, run, of)]
        if not left:
            return
        time.sleep(0.002)  # a read from the disk
        for part in left:
            drop(*part)


def _resident(address: int, run: Part, of: npt.NDArray[np.uint8]) -> list[Part]:
    """What of `run` is in memory although a file holds it; `of` is the file's number of each page, or 0."""
    mask, how = in_memory(address, run)
    if mask is None or how != "mincore" or not mask.any():
        return []
    return runs_of(mask & (of[run[0] // PAGE_BYTES : run[1] // PAGE_BYTES] != 0), run[0])


def missing(
    address: int, parts: Iterable[Part], of: npt.NDArray[np.uint8], most: int
) -> tuple[list[Part], int, bool, str]:
    """What of `parts` lacks pages that a file holds, up to `most` bytes that are lacking.

    Returns:
        These parts; the bytes lacking in them; whether that is all; and by what that was counted.
    """
    found: list[Part] = []
    n_bytes, how = 0, "mincore"
    for start, stop in parts:
        mask, how = in_memory(address, (start, stop))
        held: Mask = of[start // PAGE_BYTES : stop // PAGE_BYTES] != 0
        lacking = held if mask is None else held & ~mask
        allowed = int(np.searchsorted(np.cumsum(lacking), (most - n_bytes) // PAGE_BYTES, side="right"))
        if lacking[:allowed].any():
            found.append((start, start + allowed * PAGE_BYTES))
            n_bytes += bytes_of(lacking[:allowed])
        if allowed < len(lacking):
            return found, n_bytes, False, how
    return found, n_bytes, True, how
