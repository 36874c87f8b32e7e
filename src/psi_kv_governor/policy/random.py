"""The baseline that every other policy has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from psi_kv_governor.cache import Evidence, Range, Values
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.policy.base import Policy


@dataclass(frozen=True)
class Random(Policy):
    """Any block may go first: the baseline, seeded.

    A block's score depends on its first position and the seed alone, so several small trims give up what
    one large one would.
    """

    name: ClassVar[str] = "random"
    source: ClassVar[str] = "baseline"

    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise BadInputError(f"the seed {self.seed} of the policy random is not usable: give 0 or more")

    def score(self, blocks: Sequence[Range], next_position: int, evidence: Evidence) -> Values:
        """A uniform number from 0 to 1 for each block, shape (len(blocks),)."""
        del next_position, evidence
        starts = np.array([block.start for block in blocks], dtype=np.int64)
        # The first n numbers of a generator are the same however many are drawn.
        return np.random.default_rng(self.seed).random(int(starts.max(initial=0)) + 1)[starts]
