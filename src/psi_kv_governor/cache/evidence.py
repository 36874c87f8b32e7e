"""What an engine can tell a policy about the positions of a sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from psi_kv_governor.cache.ranges import Range

if TYPE_CHECKING:  # a third of what a command like `psi-kv status` would import, which asks for no evidence
    import numpy as np
    import numpy.typing as npt

Values: TypeAlias = "npt.NDArray[np.float64]"
"""One value a position or a block."""

Kind = Literal["arrivals", "key_norms", "key_diffs", "attention", "last_used", "demand"]
"""The kinds of evidence, by the names of their methods in `Evidence`."""


class Evidence(Protocol):
    """What an engine can tell about the positions of one sequence.

    Each method gives one value for each position of `part`, shape (part.cells,), and NaN where nothing is
    known. It may be called from any thread while tokens are decoded: what is decoded meanwhile may be
    missing from the answer. Where `why_not` gives a reason, the method is not to be called.
    """

    def why_not(self, kind: Kind) -> str:
        """Why evidence of this kind can't be had from this cache, in one clause; '' where it can."""

    def arrivals(self, part: Range) -> Values:
        """When the rows came into the cache, as a rising number."""

    def key_norms(self, part: Range) -> Values:
        """Length of the keys: |k| in each layer and head over its mean there, averaged; 1 is the mean."""

    def key_diffs(self, part: Range) -> Values:
        """How unlike its fellows a key is (KeyDiff, arXiv 2504.15364).

        Returns:
            -cos(k, a) averaged over layers and heads, where a is the mean of the normalised keys of all live
            positions in that layer and head.
        """

    def attention(self, part: Range) -> Values:
        """Attention received of late in the sampled layers; 1 is an equal share among all positions."""

    def last_used(self, part: Range) -> Values:
        """When a position was last looked at. Between sequences: the same clock.

        Returns:
            Number of the newest sampled query that gave a position more than an equal share of its
            attention; 0 where none did yet.
        """

    def demand(self, part: Range) -> Values:
        """What the newest questions wanted, where recall looks for it.

        Returns:
            The share of a query's attention that the position's block got of late, or would get were it live.
        """
