"""What a cache of transformers can tell a policy: keys read in place, and the attention of late queries."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from psi_kv_governor.cache import Kind, Range, Values
from psi_kv_governor.engines.transformers.cache import GovernedCache
from psi_kv_governor.engines.transformers.queries import Queries

_PATIENCE_S = 2.0
_POOL = 5
"""Neighbours over which attention is averaged (SnapKV, arXiv 2404.14469): a fact is more than one token."""
_LAYERS = 4  # sampled for attention, evenly spread


class Watch:
    """What is gathered about one cache while tokens are decoded."""

    def __init__(self, cache: GovernedCache) -> None:
        import weakref

        self._cache = weakref.ref(cache)
        self.queries: Queries | None = None

    def collect(self, kinds: frozenset[Kind], *, every_layer: bool = False) -> None:
        """Keep the last hidden states of some layers (or of all) if a kind needs them."""
        cache = self._cache()
        wanted = bool(kinds & {"attention", "last_used"})
        if self.queries is not None and (not wanted or (every_layer and not self.queries.every_layer)):
            self.queries.close()
            self.queries = None
        if wanted and self.queries is None and cache is not None:
            self.queries = Queries(cache, None if every_layer else _LAYERS)


class CacheEvidence:
    """An `Evidence` about the one sequence (the batch) of a cache; see psi_kv_governor.cache."""

    def __init__(self, cache: GovernedCache, watch: Watch) -> None:
        self.cache = cache
        self.watch = watch

    def why_not(self, kind: Kind) -> str:
        """See Evidence."""
        if kind in ("attention", "last_used"):
            queries = self.watch.queries
            return queries.why_not if queries is not None else ""
        return ""

    def arrivals(self, part: Range) -> Values:
        """See Evidence: rows come in the order of their positions."""
        return np.arange(part.start, part.stop, dtype=np.float64)

    def key_norms(self, part: Range) -> Values:
        """See Evidence. Reads every live key once."""
        return self._of_keys(part, key_norms)

    def key_diffs(self, part: Range) -> Values:
        """See Evidence. Reads every live key twice."""
        return self._of_keys(part, key_diffs)

    def attention(self, part: Range) -> Values:
        """See Evidence. The last 32 queries; averaged over five neighbours."""
        found = self._sampled()
        if found is None:
            return np.full(part.cells, np.nan)
        kernel = np.ones(_POOL)
        known = np.convolve(found[0], kernel, "same") / np.convolve(np.ones(len(found[0])), kernel, "same")
        return self._placed(part, known)

    def demand(self, part: Range) -> Values:
        """See Evidence."""
        recaller = self.cache.recaller
        return np.full(part.cells, np.nan) if recaller is None else recaller.demand.of(part)

    def last_used(self, part: Range) -> Values:
        """See Evidence."""
        found = self._sampled()
        return np.full(part.cells, np.nan) if found is None else self._placed(part, found[1])

    def _sampled(self) -> tuple[Values, Values] | None:
        queries = self.watch.queries
        if queries is None:
            return None
        with self.cache.at_rest(_PATIENCE_S) as still:
            return queries.sample() if still else None

    def _of_keys(self, part: Range, measure: Any) -> Values:
        with self.cache.at_rest(_PATIENCE_S) as still:
            if not still or not self.cache.tensors:
                return np.full(part.cells, np.nan)
            layers = [layer.keys for layer in self.cache.governed if layer.keys is not None]
            total = sum(measure(keys) for keys in layers) / len(layers)
            return self._placed(part, total.numpy())

    def _placed(self, part: Range, of_rows: Values) -> Values:
        """What is known of each row, by position; NaN where there is no row."""
        placed = np.full(part.cells, np.nan)
        positions = self.cache.places.live_positions()[: len(of_rows)]
        inside = (positions >= part.start) & (positions < part.stop)
        placed[positions[inside] - part.start] = of_rows[: len(positions)][inside]
        return placed


def key_norms(keys: torch.Tensor) -> torch.Tensor:
    """|k| over its mean, averaged over batch and heads, of keys [batch, heads, rows, head_dim]: (rows,)."""
    norms = torch.linalg.vector_norm(keys.float(), dim=-1)
    return (norms / norms.mean(dim=-1, keepdim=True).clamp_min(1e-12)).double().mean(dim=(0, 1))


def key_diffs(keys: torch.Tensor) -> torch.Tensor:
    """-cos(k, a) where a is the mean of the normalised keys, averaged over batch and heads: (rows,)."""
    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    anchor = unit.mean(dim=-2, keepdim=True)
    return -torch.cosine_similarity(unit, anchor, dim=-1).double().mean(dim=(0, 1))
