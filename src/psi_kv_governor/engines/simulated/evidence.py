"""Evidence about tokens that no model ever saw: plausible, seeded, and the same at every call."""

from __future__ import annotations

import functools

import numpy as np

from psi_kv_governor.cache import Kind, Range, Values
from psi_kv_governor.engines.simulated.sequence import PaperSequence

_TAIL = 1.2
"""Exponent of the Pareto law by which attention is spread: a tenth of the tokens gets about half of it."""
_SPREAD = 0.1
"""Standard deviation of key norms and cosines: about that of SmolLM2-135M's, averaged over its layers."""


@functools.lru_cache(maxsize=32)
def _made_up(seed: int, size: int) -> tuple[Values, Values, Values]:
    """Norms, diffs and attention of `size` positions."""
    return (
        np.random.default_rng([seed, 0]).normal(1.0, _SPREAD, size),
        np.random.default_rng([seed, 1]).normal(-0.5, _SPREAD, size),
        np.random.default_rng([seed, 2]).pareto(_TAIL, size),
    )


class PaperEvidence:
    """An `Evidence` for a sequence that is only counted. What is not live is not known, as in a real one."""

    def __init__(self, sequence: PaperSequence, capacity: int, seed: int = 0) -> None:
        self._sequence = sequence
        self._norms, self._diffs, self._attention = _made_up(seed, capacity)

    def why_not(self, kind: Kind) -> str:
        """'': everything can be made up."""
        del kind
        return ""

    def arrivals(self, part: Range) -> Values:
        """Positions came in their order."""
        return self._known(part, np.arange(float(len(self._norms))))

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
        return self._known(part, np.arange(float(len(self._norms))) + np.floor(self._attention))

    def demand(self, part: Range) -> Values:
        """Nobody asks."""
        return np.full(part.cells, np.nan)

    def _known(self, part: Range, values: Values) -> Values:
        return np.where(self._sequence.known(part), values[part.start : part.stop], np.nan)
