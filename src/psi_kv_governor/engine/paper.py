"""Evidence about tokens that no model ever saw: plausible, seeded, and the same at every call."""

from __future__ import annotations

import numpy as np

from psi_kv_governor.ledger import LIVE, Ledger
from psi_kv_governor.policy.base import Kind, Range, Values

_TAIL = 1.2
"""Exponent of the Pareto law by which attention is spread: a tenth of the tokens gets about half of it."""
_SPREAD = 0.1
"""Standard deviation of key norms and cosines: about that of SmolLM2-135M's, averaged over its layers."""


class PaperEvidence:
    """An `Evidence` for a cache that only counts. What is not live is not known, as in a real one."""

    def __init__(self, ledger: Ledger, seed: int = 0) -> None:
        self._ledger = ledger
        size = ledger.capacity
        self._norms = np.random.default_rng([seed, 0]).normal(1.0, _SPREAD, size)
        self._diffs = np.random.default_rng([seed, 1]).normal(-0.5, _SPREAD, size)
        self._attention = np.random.default_rng([seed, 2]).pareto(_TAIL, size)

    def why_not(self, kind: Kind) -> str:
        """'': everything can be made up."""
        del kind
        return ""

    def collect(self, kinds: frozenset[Kind]) -> None:
        """Nothing has to be gathered."""

    def arrivals(self, part: Range) -> Values:
        """When each live position came into the cache."""
        return self._ledger.arrivals(part)

    def key_norms(self, part: Range) -> Values:
        """Spread about 1."""
        return self._known(part, self._norms)

    def key_diffs(self, part: Range) -> Values:
        """Spread about -0.5."""
        return self._known(part, self._diffs)

    def attention(self, part: Range) -> Values:
        """Few positions get most of it."""
        return self._known(part, self._attention)

    def last_used(self, part: Range) -> Values:
        """The more attention, the later used, and nothing before it was decoded."""
        return self._known(part, np.arange(float(self._ledger.capacity)) + np.floor(self._attention))

    def _known(self, part: Range, values: Values) -> Values:
        known = np.full(part.cells, np.nan)
        for run in self._ledger.ranges(LIVE, part):
            known[run.start - part.start : run.stop - part.start] = values[run.start : run.stop]
        return known
