"""Attention where it was sampled, keys elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from psi_kv_governor.errors import BadInputError
from psi_kv_governor.policy.attention import Attention
from psi_kv_governor.policy.base import Evidence, Kind, Policy, Range, Values
from psi_kv_governor.policy.keynorm import KeyNorm
from psi_kv_governor.policy.pool import ranks, top_mean


@dataclass(frozen=True)
class Hybrid(Policy):
    """Attention with a third of the say for keys; where none was sampled, keys.

    Attention knows what the last queries looked at, and nothing of a fact that nobody asked for yet; keys
    know a token that stands out whoever asks. The two have no common scale, so a block counts with its
    place in the order of either.
    """

    name: ClassVar[str] = "hybrid"
    source: ClassVar[str] = "attention and keynorm together"
    needs: ClassVar[frozenset[Kind]] = frozenset({"attention", "key_norms"})

    attention_share: float = 2 / 3
    """What attention has to say where it was sampled, from 0 (nothing) to 1 (all)."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.attention_share <= 1.0:  # also refuses NaN
            raise BadInputError(
                f"attention_share = {self.attention_share} of the policy hybrid is not usable: give 0 to 1"
            )

    def score(self, blocks: Sequence[Range], next_position: int, evidence: Evidence) -> Values:
        """Place of each block among the others, 0 to 1, shape (len(blocks),)."""
        del next_position
        by_attention = ranks(top_mean(blocks, evidence.attention, Attention.top_share))
        shortness = top_mean(blocks, lambda part: -evidence.key_norms(part), KeyNorm.top_share)
        by_keys = np.nan_to_num(ranks(shortness), nan=0.5)
        together = self.attention_share * by_attention + (1.0 - self.attention_share) * by_keys
        return np.where(np.isnan(by_attention), by_keys, together)
