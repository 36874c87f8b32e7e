"""The contract of a policy: blocks in, scores out, on the evidence that an engine can give."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from psi_kv_governor.cache import Evidence, Kind, Range, Values


class Policy(ABC):
    """Scores blocks; the lowest score goes first. Protection is not its matter (see `select`).

    A policy is a frozen dataclass in a file of its own: its fields are its configuration, checked on
    creation (BadInputError), the first line of its docstring is what `psi-kv policies` shows, and it gives
    only `score`.
    """

    name: ClassVar[str]
    """The name by which it is chosen."""
    source: ClassVar[str]
    """Where it comes from: a paper's arXiv number, or how it is commonly known."""
    needs: ClassVar[frozenset[Kind]] = frozenset()
    """The evidence without which it can't score. A cache that can't give it refuses the policy at once."""
    scattered: ClassVar[bool] = True
    """Whether its blocks lie apart, so that each has to fill whole pages by itself to return memory."""

    @abstractmethod
    def score(self, blocks: Sequence[Range], next_position: int, evidence: Evidence) -> Values:
        """Worth of each block, shape (len(blocks),), finite.

        `blocks` are live, disjoint and not empty, in any order; `next_position` is the context's length.
        """
