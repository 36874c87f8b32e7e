"""Parts of a mapping in bytes and pages, and what was done with them: plain data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec
import numpy as np

from psi_kv_governor.kernel.memory import PAGE_BYTES, Mask

Part = tuple[int, int]
"""Bytes `start` to `stop` (exclusive) of a mapping."""


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """What was really done."""

    bytes_returned: int = 0
    """Bytes that are no longer in memory, counted by `counted`."""
    bytes_back: int = 0
    """Bytes that came into memory."""
    written_bytes: int = 0
    """Bytes that had to be written for it."""
    finished: bool = True
    """False where the deadline or the bytes were up first, or something failed."""
    problem: str = ""
    """Why less than asked was done, in one clause."""
    counted: str = "mincore"
    """By what: `mincore`, `pagemap` (what this process maps), or `computed` where neither is to be had."""


def inward(parts: Iterable[Part] | None, n_bytes: int) -> Iterator[Part]:
    """`parts` within the mapping (None: all), rounded inward to whole pages: outward are neighbours."""
    for start, stop in [(0, n_bytes)] if parts is None else parts:
        first = -(-max(0, start) // PAGE_BYTES) * PAGE_BYTES
        last = min(stop, n_bytes) // PAGE_BYTES * PAGE_BYTES
        if first < last:
            yield first, last


def slices(runs: Iterable[Part], n_bytes: int) -> Iterator[Part]:
    """The same bytes in pieces of at most `n_bytes`."""
    for start, stop in runs:
        for first in range(start, stop, n_bytes):
            yield first, min(stop, first + n_bytes)


def batches(runs: Iterable[Part], n_bytes: int) -> Iterator[list[Part]]:
    """The same bytes in pieces, as many at a time as have `n_bytes` in all, at most."""
    batch: list[Part] = []
    room = n_bytes
    for start, stop in slices(runs, n_bytes):
        if stop - start > room:
            yield batch
            batch, room = [], n_bytes
        batch.append((start, stop))
        room -= stop - start
    if batch:
        yield batch


def runs_of(mask: Mask, start: int) -> list[Part]:
    """The bytes of the pages where `mask` is true, when its first page is at `start`."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return [(start + int(a) * PAGE_BYTES, start + int(b) * PAGE_BYTES) for a, b in edges.reshape(-1, 2)]


def bytes_of(mask: Mask) -> int:
    """Bytes of the pages where `mask` is true."""
    return int(np.count_nonzero(mask)) * PAGE_BYTES
