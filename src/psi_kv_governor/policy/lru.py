"""Least recently used, where use is attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from psi_kv_governor.cache import Evidence, Kind, Range, Values
from psi_kv_governor.policy.base import Policy
from psi_kv_governor.policy.pool import highest, without_gaps


@dataclass(frozen=True)
class Lru(Policy):
    """The blocks that were attended to longest ago go first.

    A block is in use as long as one of its tokens gets more than an equal share of a sampled query's
    attention: a hit in a cache's sense, with the model as the user.
    """

    name: ClassVar[str] = "lru"
    source: ClassVar[str] = "least recently used"
    needs: ClassVar[frozenset[Kind]] = frozenset({"last_used"})

    def score(self, blocks: Sequence[Range], next_position: int, evidence: Evidence) -> Values:
        """Newest query that used any token of each block, shape (len(blocks),)."""
        del next_position
        return without_gaps(highest(blocks, evidence.last_used))
