"""A policy of one's own: every other block goes first, so that what is left is spread over the whole text.

    python examples/own_policy.py MODEL.gguf

A package names it in the entry-point group `psi_kv_governor.policies`; then `--policy comb` finds it.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from psi_kv_governor import GovernedLlama
from psi_kv_governor.cache import Evidence, Range, Values
from psi_kv_governor.policy import Policy


@dataclass(frozen=True)
class Comb(Policy):
    """Every `teeth`-th block stays longest."""

    name: ClassVar[str] = "comb"
    source: ClassVar[str] = "an example"
    teeth: int = 2

    def score(self, blocks: Sequence[Range], next_position: int, evidence: Evidence) -> Values:
        """1 for a block that stays, else 0, shape (len(blocks),)."""
        del next_position, evidence
        size = max(block.cells for block in blocks)
        return np.array([float(block.start // size % self.teeth == 0) for block in blocks])


if __name__ == "__main__":
    llm = GovernedLlama(sys.argv[1], policy=Comb(), n_ctx=2048, flash_attn=True, verbose=False)
    text = "The quick brown fox jumps over the lazy dog. " * 150
    # In the middle of an answer: of a conversation that is idle all is parked, and no policy is asked.
    for number, _ in enumerate(llm.create_completion(text, max_tokens=5, stream=True)):
        if number == 3:
            print(llm.governor.trim(0.4).masked, "cells masked")
            (sequence,) = llm.governor.status().caches[0].sequences
            print("masked:", ", ".join(f"{part.start}-{part.stop}" for part in sequence.masked))
    # Nothing is short here, so the governor may have begun to give back by itself.
    print(llm.governor.restore().cells, "cells back")
    print("masked at the end:", llm.governor.status().caches[0].sequences[0].masked)
    llm.close()
