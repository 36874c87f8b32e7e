"""Which blocks of the pool have bytes in memory, as far as is known: bookkeeping of the scheduler's side.

A block is used, cached (nobody uses it, and a hash finds it again) or bare. Used and cached ones keep their
bytes; those of a cached one may be parked, and vLLM's own look-up by hash finds it all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Free(NamedTuple):
    """The blocks that no request uses, the least recently used first."""

    cached: list[int]
    """Found again by hash, and in memory."""
    parked: list[int]
    """Found again by hash, and not in memory."""
    bare: list[int]
    """Of no use to anybody, and in memory."""


class Ledger:
    """One truth for each block: whether its bytes were ever written, and not given up since."""

    def __init__(self, n_blocks: int) -> None:
        self.n_blocks = n_blocks
        self._here = np.zeros(n_blocks, dtype=np.bool_)
        self._stored = np.zeros(n_blocks, dtype=np.bool_)

    def came(self, blocks: Iterable[int]) -> None:
        """Somebody uses these from now on, or they were read back."""
        known = self._known(blocks)
        self._here[known], self._stored[known] = True, False

    def went(self, blocks: Iterable[int], *, stored: bool = False) -> None:
        """These were given up; `stored` where a file has their content."""
        known = self._known(blocks)
        self._here[known], self._stored[known] = False, stored

    def stored(self, blocks: Iterable[int]) -> set[int]:
        """Those of `blocks` that only a file has."""
        return {block for block in self._known(blocks) if self._stored[block]}

    def here(self, blocks: Iterable[int]) -> list[int]:
        """Those of `blocks` that are in memory."""
        return [block for block in self._known(blocks) if self._here[block]]

    @property
    def n_here(self) -> int:
        """Blocks in memory."""
        return int(np.count_nonzero(self._here))

    def free(self, queue: Iterable[tuple[int, bool]]) -> Free:
        """The free blocks of `queue` (number, and whether a hash finds it), in its order."""
        found = Free([], [], [])
        for block, cached in queue:
            if not 0 <= block < self.n_blocks:
                continue
            if self._here[block]:
                (found.cached if cached else found.bare).append(block)
            elif cached:
                found.parked.append(block)
        return found

    def _known(self, blocks: Iterable[int]) -> list[int]:
        return [block for block in blocks if 0 <= block < self.n_blocks]


def first_bytes(blocks: Sequence[int], n_bytes: int, block_bytes: int) -> list[int]:
    """The first of `blocks` that make at least `n_bytes`; all where they are not enough."""
    return list(blocks[: -(-max(0, n_bytes) // max(1, block_bytes))])
