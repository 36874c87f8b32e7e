"""Which memory of a running program may be moved to a file without its help: large allocations of glibc's
malloc that are a mapping of their own, and no other anonymous memory.

A heap, a stack or another allocator's memory may count on MADV_DONTNEED giving zeros; what malloc mapped for
one allocation is only ever used, resized or unmapped whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from psi_kv_governor.kernel.memory import PAGE_BYTES

SMALLEST_BYTES = 4 << 20
"""malloc maps from 128 KiB to 32 MiB on, as it learns; below this there is little to be had."""
_HEADER_BYTES = 16
_IS_MAPPED, _FLAGS = 2, 7  # in the size field of a chunk of malloc
_VMA = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ (\d+)\s*(.*)$")
_NEVER = {"lo", "dc", "io", "pf", "ht", "um", "uw", "mt"}
"""Locked, not for forks (as drivers and RDMA mark it), of a device, huge by name, of userfaultfd, tagged."""
_PRESENT, _SWAPPED = np.uint64(1 << 63), np.uint64(1 << 62)


class Allocation(NamedTuple):
    """One of them. Its first page stays as it is: so malloc won't grow it in place, past a file's end."""

    start: int
    stop: int
    resident_bytes: int


def allocations(pid: int) -> list[Allocation]:
    """Those of a process, the largest resident first. Raises OSError where it can't be looked into."""
    found = []
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for start, stop in _mappings(Path(f"/proc/{pid}/smaps").read_text()):
            found += [
                Allocation(first, last, int(resident(pid, first, last).sum()) * PAGE_BYTES)
                for first, last in _chunks(memory, start, stop)
                if last - first >= SMALLEST_BYTES
            ]
    return sorted(found, key=lambda one: -one.resident_bytes)


def _mappings(smaps: str) -> Iterator[tuple[int, int]]:
    """Private anonymous writable mappings without a name, that nobody has a claim on."""
    start = stop = 0
    for line in smaps.splitlines():
        if head := _VMA.match(line):
            start, stop = (int(head[1], 16), int(head[2], 16)) if _plain(head) else (0, 0)
        elif line.startswith("VmFlags:") and stop and not _NEVER & set(line.split()[1:]):
            yield start, stop


def _plain(head: re.Match[str]) -> bool:
    return head[3] == "rw-p" and head[4] == "0" and head[5] in {"", "[anon: glibc: malloc]"}


def still_there(pid: int, mem: int, one: Allocation, start: int, stop: int) -> bool:
    """Whether a slice of the allocation is anonymous memory of it still. `mem` is the process' memory."""
    heads = filter(None, map(_VMA.match, Path(f"/proc/{pid}/maps").read_text().splitlines()))
    if not any(int(h[1], 16) <= start and stop <= int(h[2], 16) and _plain(h) for h in heads):
        return False
    return _chunk_bytes(os.pread(mem, PAGE_BYTES, one.start), one.stop - one.start) == one.stop - one.start


def _chunks(memory: BinaryIO, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The chunks of malloc that fill a mapping from its start: neighbours are one mapping to the kernel."""
    while stop - start >= PAGE_BYTES:
        memory.seek(start)
        try:
            n_bytes = _chunk_bytes(memory.read(PAGE_BYTES), stop - start)
        except OSError:  # the guard page of a thread's stack
            return
        if not n_bytes:
            return
        yield start, start + n_bytes
        start += n_bytes


def _chunk_bytes(page: bytes, most: int) -> int:
    """Size of the chunk whose header stands in this first page of it; 0 where there is none.

    malloc.c: two words, the padding before the header and the rest of the size with its flags. Where memory
    of some alignment was asked for there is padding. Since glibc 2.43 the header is not part of the size.
    """
    words = np.frombuffer(page, np.uint64)
    for padding in range(0, len(page) - _HEADER_BYTES, _HEADER_BYTES):
        before, size = int(words[padding // 8]), int(words[padding // 8 + 1])
        if before == padding and size & _FLAGS == _IS_MAPPED:
            for whole in (size - _IS_MAPPED + padding, size - _IS_MAPPED + padding + _HEADER_BYTES):
                if not whole % PAGE_BYTES and 0 < whole <= most:
                    return whole
    return 0


def resident(pid: int, start: int, stop: int) -> npt.NDArray[np.bool_]:
    """Of each page, whether there is one (in memory or swapped out): the others were never touched."""
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as table:
        table.seek(start // PAGE_BYTES * 8)
        raw = table.read((stop - start) // PAGE_BYTES * 8)
    entries = np.frombuffer(raw, np.uint64)
    there: npt.NDArray[np.bool_] = (entries & (_PRESENT | _SWAPPED)) != 0
    return there
