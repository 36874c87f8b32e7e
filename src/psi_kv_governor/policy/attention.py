"""What the model looks at stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from psi_kv_governor.cache import Evidence, Kind, Range, Values
from psi_kv_governor.policy.base import Policy
from psi_kv_governor.policy.pool import check_share, top_mean, without_gaps


@dataclass(frozen=True)
class Attention(Policy):
    """Tokens that got little attention of late go first.

    H2O (Zhang et al. 2023, arXiv 2306.14048) keeps what gathered most attention over all queries; SnapKV
    (Li et al. 2024, arXiv 2404.14469) what the last queries of the prompt looked at, pooled over neighbours.
    Here: a running mean over sampled queries, the newer weighing more, which a prompt's last queries enter
    in full. Being a mean over the queries that could see a token, it favours neither old nor young.
    """

    name: ClassVar[str] = "attention"
    source: ClassVar[str] = "H2O, arXiv 2306.14048; SnapKV, arXiv 2404.14469"
    needs: ClassVar[frozenset[Kind]] = frozenset({"attention"})

    top_share: float = 1 / 4
    """Share of a block's cells, the most attended, that make its score. A fact that the newest queries asked
    for had the best block of all with any share from 1/32 to 1. The divergence from the full cache was 0.93
    of `window`'s with a quarter and 1.01 with a sixteenth (SmolLM2-135M, nine passages of 2,048 tokens, half
    given up, geometric mean)."""

    def __post_init__(self) -> None:
        check_share(self.name, self.top_share)

    def score(self, blocks: Sequence[Range], next_position: int, evidence: Evidence) -> Values:
        """Attention of the most attended tokens of each block, shape (len(blocks),)."""
        del next_position
        return without_gaps(top_mean(blocks, evidence.attention, self.top_share))
