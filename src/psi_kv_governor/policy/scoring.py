"""A policy at work on the sequences of an engine: what it thinks of each block, and what it last thought."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import cast

import numpy as np
import numpy.typing as npt

from psi_kv_governor.cache import CacheState, Evidence, Range, SequenceState, Snapshot
from psi_kv_governor.errors import BadInputError, EngineError
from psi_kv_governor.policy.base import Policy
from psi_kv_governor.policy.registry import POLICIES
from psi_kv_governor.policy.select import Protection, Scored, score
from psi_kv_governor.policy.window import Window

LEAST_PAGES = 6
"""Pages that a lone block fills in the tensor with the shortest rows. A block that begins and ends within a
page keeps the whole of both: of six pages one in the mean, so five sixths of the bytes come free."""
MOST_BLOCKS = 256
"""Blocks of a full context: each may be a mapping of its own in every layer, and a process has 65,530."""


def why_not_served(policy: Policy | type[Policy], evidence: Evidence) -> str:
    """Why the cache can't give what the policy needs; '' where it can."""
    return next(filter(None, map(evidence.why_not, sorted(policy.needs))), "")


def check_served(policy: Policy, evidence: Evidence) -> None:
    """Raises BadInputError when the cache can't give what the policy needs, naming what can be used."""
    if why := why_not_served(policy, evidence):
        served = [name for name, other in POLICIES.items() if not why_not_served(other, evidence)]
        raise BadInputError(
            f"the policy {policy.name} can't be used with this cache: {why}; use {', '.join(served)}"
        )


def block_size(policy: Policy, block_cells: int, row_bytes: int, capacity: int) -> int:
    """Cells of a block: the least multiple of `block_cells` with which LEAST_PAGES and MOST_BLOCKS hold.

    `row_bytes` are those of the shortest row, `capacity` the cells of the whole context. A policy whose
    blocks lie side by side keeps `block_cells`.
    """
    if not policy.scattered:
        return block_cells
    least = max(block_cells, -(-LEAST_PAGES * mmap.PAGESIZE // row_bytes), -(-capacity // MOST_BLOCKS))
    return -(-least // block_cells) * block_cells


class Scores:
    """Scores blocks by `policy`, and remembers what it thought of each position.

    A policy that fails is somebody's mistake and no reason to be killed for want of memory: the oldest
    blocks go then, and `complain` is told why.
    """

    def __init__(
        self,
        policy: Policy,
        evidence: Callable[[int, int], Evidence],
        block_cells: int,
        complain: Callable[[str], None] = lambda why: None,
    ) -> None:
        """`evidence` gives that of a sequence by the numbers of its cache and itself; see Engine."""
        self.policy = policy
        self._evidence = evidence
        self._block_cells = block_cells
        self._complain = complain
        self._known: dict[tuple[int, int], npt.NDArray[np.float64]] = {}

    def lowest(
        self, cache: CacheState, sequence: SequenceState, protection: Protection, cells: int
    ) -> list[Range]:
        """The ranges of `sequence` that go for `cells` cells, and no more than those. Empty for a sequence
        that is gone meanwhile."""
        evidence: Evidence | None = None
        try:
            evidence = self._evidence(cache.id, sequence.id)
        except EngineError:  # of this sequence: an engine that is gone says so when the plan is applied
            return []
        except Exception as error:
            self._complain(f"nothing is told of the cache ({error}): the oldest blocks go")
        scored = self._score(cache, sequence, protection, evidence)
        known = self._of(cache.id, sequence)
        for block, thought in zip(scored.blocks, scored.scores, strict=True):
            known[block.start : block.stop] = thought
        return scored.lowest(cells, cells)

    def last(self, cache: int, sequence: SequenceState, part: Range) -> float:
        """Mean of the last known scores of `part`; -inf where a position was never scored."""
        known = self._known.get((cache, sequence.id))
        if known is None or part.stop > len(known) or part.cells <= 0:
            return -np.inf
        return float(known[part.start : part.stop].mean())

    def forget(self, snapshot: Snapshot) -> None:
        """Drop what was thought of sequences that are gone, and of positions that hold other tokens now."""
        if not self._known:
            return
        lengths = {
            (cache.id, one.id): one.next_position for cache in snapshot.caches for one in cache.sequences
        }
        for key in [key for key in self._known if key not in lengths]:
            del self._known[key]
        for key, known in self._known.items():
            known[lengths[key] :] = -np.inf

    def _of(self, cache: int, sequence: SequenceState) -> npt.NDArray[np.float64]:
        key = (cache, sequence.id)
        known = self._known.get(key, np.empty(0))
        if len(known) < sequence.next_position:
            longer = np.full(max(1024, 2 * sequence.next_position), -np.inf)
            longer[: len(known)] = known
            self._known[key] = known = longer
        return known

    def _score(
        self, cache: CacheState, sequence: SequenceState, protection: Protection, evidence: Evidence | None
    ) -> Scored:
        try:
            if evidence is not None:
                if not (why := why_not_served(self.policy, evidence)):
                    return self._scored_by(self.policy, cache, sequence, protection, evidence)
                self._complain(f"the policy {self.policy.name} can't be used with this cache ({why})")
        except Exception as error:
            self._complain(f"the policy {self.policy.name} failed ({error}): the oldest blocks go instead")
        return self._scored_by(Window(), cache, sequence, protection, evidence)

    def _scored_by(
        self,
        policy: Policy,
        cache: CacheState,
        sequence: SequenceState,
        protection: Protection,
        evidence: Evidence | None,
    ) -> Scored:
        return score(
            policy,
            list(sequence.live),
            sequence.next_position,
            cast(Evidence, evidence),  # the window asks for none
            protection=protection,
            block_cells=block_size(policy, self._block_cells, cache.row_bytes, cache.capacity_cells),
        )
