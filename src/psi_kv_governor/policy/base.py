"""The contract of a policy: blocks in, scores out, on the evidence that an engine can give."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
"""One value a position or a block."""

Kind = Literal["arrivals", "key_norms", "key_diffs", "attention", "last_used"]
"""The kinds of evidence, by the names of their methods in `Evidence`."""


class Range(NamedTuple):
    """Positions `start` to `stop` (exclusive) of one sequence."""

    start: int
    stop: int

    @property
    def cells(self) -> int:
        """Number of positions, and so of cells, in the range."""
        return self.stop - self.start


class Evidence(Protocol):
    """What an engine can tell about the positions of its sequence.

    Each method gives one value for each position of `part`, shape (part.cells,), and NaN where nothing is
    known. It may be called from any thread while tokens are decoded: what is decoded meanwhile may be
    missing from the answer. Where `why_not` gives a reason, the method is not to be called.
    """

    def why_not(self, kind: Kind) -> str:
        """Why evidence of this kind can't be had from this cache, in one clause; '' where it can."""

    def collect(self, kinds: frozenset[Kind]) -> None:
        """Gather from now on what has to be gathered while tokens are decoded. Costs nothing for keys."""

    def arrivals(self, part: Range) -> Values:
        """When the rows came into the cache (decoded, recomputed or restored), as a rising number."""

    def key_norms(self, part: Range) -> Values:
        """Length of the keys: |k| in each layer and head over its mean there, averaged; 1 is the mean."""

    def key_diffs(self, part: Range) -> Values:
        """How unlike its fellows a key is: -cos(k, a) averaged over layers and heads, where a is the mean
        of the normalised keys of all live positions in that layer and head (KeyDiff, arXiv 2504.15364)."""

    def attention(self, part: Range) -> Values:
        """Attention received of late in the sampled layers; 1 is an equal share among all positions."""

    def last_used(self, part: Range) -> Values:
        """Number of the newest sampled query that gave a position more than an equal share of its attention
        (0: none did yet). Between sequences: the same clock."""


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
