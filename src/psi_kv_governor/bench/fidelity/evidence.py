"""The engine as the benchmark shows it to a policy or a governor: gathered once, asked many times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from psi_kv_governor.engine.base import Engine, TrimResult
from psi_kv_governor.policy.base import Evidence, Kind, Range, Values
from psi_kv_governor.store.base import Store


class GatheredEvidence:
    """An engine's evidence that is gathered from the start for all policies.

    One context serves them all in turn, each with the cache as it was decoded. So it begins nothing anew for
    one of them, and what was restored after another's turn counts as decoded in its place.
    """

    def __init__(self, inner: Evidence, kinds: frozenset[Kind]) -> None:
        self._inner = inner
        inner.collect(kinds)

    def why_not(self, kind: Kind) -> str:
        """See Evidence."""
        return self._inner.why_not(kind)

    def collect(self, kinds: frozenset[Kind]) -> None:
        """Nothing: it is gathered already, and beginning anew would forget it."""

    def arrivals(self, part: Range) -> Values:
        """The order of decoding."""
        return np.arange(part.start, part.stop, dtype=np.float64)

    def key_norms(self, part: Range) -> Values:
        """See Evidence."""
        return self._inner.key_norms(part)

    def key_diffs(self, part: Range) -> Values:
        """See Evidence."""
        return self._inner.key_diffs(part)

    def attention(self, part: Range) -> Values:
        """See Evidence."""
        return self._inner.attention(part)

    def last_used(self, part: Range) -> Values:
        """See Evidence."""
        return self._inner.last_used(part)


class SharedEngine:
    """An `Engine` that many governors use in turn, with evidence that none of them begins anew."""

    def __init__(self, inner: Engine, evidence: Evidence) -> None:
        self._inner = inner
        self.evidence = evidence

    def trim(self, ranges: Sequence[Range], store: Store | None, deadline_s: float = math.inf) -> TrimResult:
        """See Engine; without the deadline: what goes is measured, and not whether this machine is slow."""
        del deadline_s
        return self._inner.trim(ranges, store)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
