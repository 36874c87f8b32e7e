"""Keys that are like all others can be spared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from psi_kv_governor.cache import Evidence, Kind, Range, Values
from psi_kv_governor.policy.base import Policy
from psi_kv_governor.policy.pool import check_share, top_mean, without_gaps


@dataclass(frozen=True)
class KeyDiff(Policy):
    """Tokens with keys like all others go first; what stands out stays.

    KeyDiff (Park et al. 2025, arXiv 2504.15364): per head a = mean of k_i / |k_i|, score_i = -cos(k_i, a),
    on the keys as they are cached (rotated by their position). There each head evicts by itself; a cell
    holds a token's rows of all heads and layers, so here the scores are averaged over them.
    """

    name: ClassVar[str] = "keydiff"
    source: ClassVar[str] = "KeyDiff, arXiv 2504.15364"
    needs: ClassVar[frozenset[Kind]] = frozenset({"key_diffs"})

    top_share: float = 1 / 16
    """Share of a block's cells, the most distinct, that make its score: 4 of 64 hold a name or a number."""

    def __post_init__(self) -> None:
        check_share(self.name, self.top_share)

    def score(self, blocks: Sequence[Range], next_position: int, evidence: Evidence) -> Values:
        """Distinctness of the most distinct keys of each block, shape (len(blocks),)."""
        del next_position
        return without_gaps(top_mean(blocks, evidence.key_diffs, self.top_share))
