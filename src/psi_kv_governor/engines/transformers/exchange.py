"""Which blocks change places: those that newer queries look for, and the least attended live ones.

The rules are those of the agent (exchange.c and recall.h, where the reasons stand): a test holds the numbers
beside theirs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from psi_kv_governor.cache import Range, Recall
from psi_kv_governor.engines.transformers.places import Places, Positions, numbers_in

BLOCK_CELLS = 16
REST = 3
LEFT = 0.8
TIMES_BETTER = 1.5
LEAST_SHARE = 0.02
LAYER_DEPTH = 0.6

Shares = npt.NDArray[np.float32]


class Exchange(NamedTuple):
    """What is to come and what is to go: as many cells are live afterwards, or fewer."""

    come: list[Range]
    go: list[Range]
    blocks: int


class Demand:
    """What each block of positions got of the queries' attention of late, or would have got."""

    def __init__(self) -> None:
        self.observed = 0
        self._score: Shares = np.zeros(0, dtype=np.float32)
        self._now = self._score
        self._moved = np.zeros(0, dtype=np.int64)

    def observe(self, now: Shares) -> None:
        """One look: the highest share of each block, below 0 where it was not observed."""
        grown = len(now) - len(self._score)
        if grown > 0:
            self._score = np.pad(self._score, (0, grown))
            self._moved = np.pad(self._moved, (0, grown), constant_values=-REST)
        self._now = np.full(len(self._score), -1, dtype=np.float32)
        self._now[: len(now)] = now
        self._score = np.maximum(self._now, LEFT * self._score)
        self.observed += 1

    def of(self, part: Range) -> npt.NDArray[np.float64]:
        """By position; NaN where nothing was observed yet."""
        blocks = np.arange(part.start, part.stop) // BLOCK_CELLS
        found = np.full(part.cells, np.nan)
        known = blocks < len(self._score)
        found[known] = self._score[blocks[known]]
        return found

    def choose(
        self, places: Places, settings: Recall, allowed_cells: float, *, question: bool
    ) -> Exchange | None:
        """What is to be exchanged now; for a `question` by what it asks for, whatever was moved before."""
        score = self._now if question else self._score
        rested = self.observed - self._moved >= (0 if question else REST)
        n = len(score)
        live, masked = _by_block(numbers_in(places.live), n), _by_block(numbers_in(places.masked), n)
        fixed = _by_block(_protected(places, settings), n)
        going = np.flatnonzero((live > 0) & (masked == 0) & (fixed == 0) & (self._now >= 0) & rested)
        coming = np.flatnonzero((masked > 0) & (self._now >= LEAST_SHARE) & rested)
        going = going[np.argsort(score[going], kind="stable")]
        coming = coming[np.argsort(-score[coming], kind="stable")]
        times = 1.0 if question else TIMES_BETTER
        come: list[int] = []
        used, spare = 0, 0
        for block in coming:
            next_, cells = used, spare
            while next_ < len(going) and cells < masked[block] and score[block] > times * score[going[next_]]:
                cells += int(live[going[next_]])
                next_ += 1
            allowed_cells -= int(masked[block])
            if cells < masked[block] or allowed_cells < 0:
                break
            used, spare = next_, cells - int(masked[block])
            come.append(int(block))
        if not come:
            return None
        gone = [int(block) for block in going[:used]]
        self._moved[come + gone] = self.observed
        return Exchange(
            come=places.masked_part([_whole(block) for block in come]),
            go=places.live_part([_whole(block) for block in gone]),
            blocks=len(come),
        )


def _whole(block: int) -> Range:
    return Range(block * BLOCK_CELLS, (block + 1) * BLOCK_CELLS)


def _by_block(positions: Positions, n: int) -> npt.NDArray[np.int64]:
    """How many of `positions` lie in each of `n` blocks."""
    return np.bincount(positions // BLOCK_CELLS, minlength=n)[:n]


def _protected(places: Places, settings: Recall) -> Positions:
    end = places.next_position
    parts = [Range(0, settings.sink_cells), Range(max(0, end - settings.window_cells), end), *settings.marked]
    return numbers_in(places.live_part(parts))


def raise_to(best: Shares, positions: Positions, logits: Shares) -> None:
    """Have `best` of each block be no less than the highest of `logits` (queries, positions) in it."""
    blocks = positions // BLOCK_CELLS
    starts = np.flatnonzero(np.r_[True, np.diff(blocks) != 0])
    highest = np.maximum.reduceat(logits.max(axis=0), starts)
    best[blocks[starts]] = np.maximum(best[blocks[starts]], highest)
