"""From a number of cells to ranges of positions: protection, blocks, and the policy's order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from psi_kv_governor.cache import Evidence, Range, Values, merged, without
from psi_kv_governor.policy.base import Policy


class Protection(NamedTuple):
    """What no policy may give up, in positions of the context."""

    sink_cells: int
    """The first tokens."""
    window_cells: int
    """The last tokens."""
    marked: tuple[Range, ...] = ()
    """Ranges anywhere: the system prompt, and what the caller marks. They may overlap."""

    def free(self, live: Sequence[Range], next_position: int) -> list[Range]:
        """The parts of `live` that may go, when the context has `next_position` tokens."""
        first, last = self.sink_cells, next_position - self.window_cells
        parts = [
            Range(start, stop)
            for run in live
            if (start := max(first, run.start)) < (stop := min(last, run.stop))
        ]
        for mark in self.marked:
            parts = [rest for part in parts for rest in without(part, mark)]
        return parts


def head_of(head_cells: int, next_position: int, head_share: float) -> int:
    """How many of the first `head_cells` positions (the system prompt) are protected, in a context of
    `next_position` tokens: `head_share` (0 to 1) of it at the most, the first of them.

    Without a cap a long prompt leaves nothing to give. What is over it is cut at its end: the first tokens
    are the sinks.
    """
    return max(0, min(head_cells, int(head_share * next_position)))


def why_nothing(live: Sequence[Range], next_position: int, protection: Protection, floor_cells: int) -> str:
    """Why no cell of `live` may go, in one clause; '' where one may. `floor_cells` is how many stay live
    whatever the pressure says."""
    live_cells = sum(part.cells for part in live)
    if not live_cells:
        return "the cache is empty"
    if not trimmable(live, next_position, protection):
        marked = sum(part.cells for part in protection.marked)
        return (
            f"all {live_cells} live cells are protected: {protection.sink_cells} first and "
            f"{protection.window_cells} last ones, and {marked} that are marked or hold the system prompt"
        )
    if live_cells <= floor_cells:
        return f"the floor of {floor_cells} cells holds: {live_cells} are live"
    return ""


def trimmable(live: Sequence[Range], next_position: int, protection: Protection) -> int:
    """Number of live cells that are not protected: what `select` can give up at most."""
    return sum(part.cells for part in protection.free(live, next_position))


@dataclass(frozen=True)
class Scored:
    """Blocks that may go, and what the policy thinks of each, shape (len(blocks),)."""

    blocks: list[Range]
    scores: Values

    def lowest(self, cells: int, most: int) -> list[Range]:
        """The ranges to give up for `cells` cells, lowest score first: sorted, disjoint, adjacent merged.

        The last block is cut where more than `most` cells would go. Fewer go only when no more are there.
        """
        chosen: list[Range] = []
        taken = 0
        for index in np.argsort(self.scores, kind="stable"):  # stable: equal scores go oldest first
            if taken >= cells:
                break
            block = self.blocks[index]
            part = Range(block.start, min(block.stop, block.start + most - taken))
            chosen.append(part)
            taken += part.cells
        return merged(chosen)


def score(
    policy: Policy,
    live: Sequence[Range],
    next_position: int,
    evidence: Evidence,
    *,
    protection: Protection,
    block_cells: int,
) -> Scored:
    """What `policy` thinks of every block of `live` that is not protected.

    Blocks begin at multiples of `block_cells`, so a block is the same tokens at every call however far the
    context has grown; at the edge of what is protected, of a hole or of a former cut a block is shorter.

    Raises ValueError when the policy's scores are not finite, or not of the shape (number of blocks,).
    """
    free = protection.free(live, next_position)
    blocks = [block for part in free for block in _cut(part, block_cells)]
    if not blocks:
        return Scored([], np.empty(0))
    scores = policy.score(blocks, next_position, evidence)
    if scores.shape != (len(blocks),):
        raise ValueError(f"policy {policy.name} scored {len(blocks)} blocks with shape {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError(f"policy {policy.name} gave a score that is not finite")
    return Scored(blocks, scores)


def select(
    policy: Policy,
    live: Sequence[Range],
    next_position: int,
    evidence: Evidence,
    *,
    cells: int,
    protection: Protection,
    block_cells: int,
) -> list[Range]:
    """The ranges of `live` to give up for `cells` cells; see `score` and `Scored.lowest`.

    No more go than `cells` rounded up to whole blocks: the law counts on that for its floor and budget.
    """
    if cells <= 0:
        return []
    scored = score(policy, live, next_position, evidence, protection=protection, block_cells=block_cells)
    return scored.lowest(cells, -(-cells // block_cells) * block_cells)


def _cut(part: Range, block_cells: int) -> Iterator[Range]:
    start = part.start
    while start < part.stop:
        stop = min(part.stop, (start // block_cells + 1) * block_cells)
        yield Range(start, stop)
        start = stop
