"""Oldest first: what is left is the sinks and the recent window (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from psi_kv_governor.cache import Evidence, Range, Values
from psi_kv_governor.policy.base import Policy


@dataclass(frozen=True)
class Window(Policy):
    """The oldest go first; the beginning and the recent window stay.

    StreamingLLM (Xiao et al. 2023, arXiv 2309.17453). Needs nothing from the cache, and gives up one run
    of neighbouring cells, so nearly every byte of them is a whole page.
    """

    name: ClassVar[str] = "window"
    source: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"
    scattered: ClassVar[bool] = False

    def score(self, blocks: Sequence[Range], next_position: int, evidence: Evidence) -> Values:
        """Position of the first token of each block, shape (len(blocks),)."""
        del next_position, evidence  # age counts, not distance: the order is the same
        return np.array([block.start for block in blocks], dtype=np.float64)
