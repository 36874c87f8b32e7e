"""What llama.cpp's cache can tell a policy: keys read in place, and attention sampled while decoding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from psi_kv_governor.cache import Kind, Range, Values
from psi_kv_governor.engines.llama.client import Client, Op, RegionInfo
from psi_kv_governor.errors import BadInputError

_KINDS: dict[Kind, int] = {
    "arrivals": 1,
    "key_norms": 2,
    "key_diffs": 3,
    "attention": 4,
    "last_used": 5,
    "demand": 6,
}
_POOL = 5
"""Neighbours over which attention is averaged (SnapKV, arXiv 2404.14469): a fact is more than the one token
that a query lands on."""


@dataclass(frozen=True)
class Sampling:
    """How much attention is sampled."""

    layers: int = 4
    """Layers, evenly spaced from the middle to five sixths of the depth: there attention looks things up.
    With SmolLM2-135M, half of 2,048 tokens given up by the attention in four of these, the divergence from
    the full cache is 0.015 in a text where it is 0.05 by all ten of them and 0.11 by four of all depths."""
    every: int = 8
    """Of the tokens decoded one by one, one in so many."""
    window: int = 32
    """Of the tokens of a prompt's batch, the last so many (SnapKV's observation window)."""
    half_life: int = 16
    """Sampled tokens after which an observation weighs half: half a window, so that what the newest batch
    of a prompt looked at has three quarters of the weight. With 32 the divergence above is 0.025."""
    near: int = 256
    """Queries within so many tokens of a cell say nothing of it. So many are protected by default, and every
    token is looked at by its neighbours: with them, the last 64 tokens of the last but one batch of a prompt
    had the highest attention of all in eight passages of nine, and the divergence of `hybrid` from the full
    cache was 0.91 of `window`'s in the geometric mean. Without them it is 0.85."""

    def __post_init__(self) -> None:
        for name in ("layers", "every", "window", "half_life"):
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} = {getattr(self, name)} is not usable: give 1 or more")
        if self.near < 0:
            raise BadInputError(f"near = {self.near} is not usable: give 0 or more")


class LlamaEvidence:
    """An `Evidence` about one sequence of one cache.

    Masked and parked cells keep the attention that they had; of their keys nothing is told, since reading
    them would bring them back.
    """

    def __init__(self, client: Client, region: RegionInfo, sequence: int) -> None:
        self._client = client
        self._region = region
        self._sequence = sequence

    def why_not(self, kind: Kind) -> str:
        """See Evidence."""
        if kind == "arrivals":
            return ""
        if not self._region.by_cell:
            return "it keeps a state and no keys"
        if kind in {"attention", "last_used"} and not self._region.maskable:
            return f"attention can't be sampled: {self._region.why_not_maskable}"
        if not self._region.readable and self._region.maskable:
            return "its keys are of a type that can't be read (type_k: f32, f16, bf16, q8_0)"
        return "" if self._region.readable else "no graph has told yet where a head's key begins"

    def arrivals(self, part: Range) -> Values:
        """See Evidence."""
        return self._of("arrivals", part)

    def key_norms(self, part: Range) -> Values:
        """See Evidence. Reads every live key once."""
        return self._of("key_norms", part)

    def key_diffs(self, part: Range) -> Values:
        """See Evidence. Reads every live key twice."""
        return self._of("key_diffs", part)

    def attention(self, part: Range) -> Values:
        """See Evidence. Averaged over five neighbours.

        Raises EngineError when the graphs were not as expected, and nothing could be sampled.
        """
        reach = _POOL // 2
        wide = Range(max(0, part.start - reach), part.stop + reach)
        pooled = _pooled(self._of("attention", wide))
        return pooled[part.start - wide.start :][: part.cells]

    def last_used(self, part: Range) -> Values:
        """See Evidence. Raises EngineError as `attention` does."""
        return self._of("last_used", part)

    def demand(self, part: Range) -> Values:
        """See Evidence. Unknown until something was masked and recall has looked for it."""
        return self._of("demand", part)

    def sampled(self) -> bytes:
        """All that was sampled so far, to go back to."""
        return self._client.ask(Op.SAMPLED, self._region.id).payload

    def rewind(self, sampled: bytes) -> None:
        """Know what was known at the time of `sampled`, and nothing later: for measurements that try one
        thing after another from the same beginning."""
        self._client.ask(Op.SAMPLED, self._region.id, content=sampled)

    def _of(self, kind: Kind, part: Range) -> Values:
        return self._client.evidence(_KINDS[kind], self._region.id, self._sequence, part)


def _pooled(values: Values) -> Values:
    """Mean over _POOL neighbours, of those that are known; NaN stays where nothing is known itself."""
    if not len(values):
        return values
    known = ~np.isnan(values)
    total, count = (
        np.convolve(what, np.ones(_POOL))[_POOL // 2 :][: len(values)]
        for what in (np.where(known, values, 0.0), known.astype(np.float64))
    )
    return np.where(known, total / np.maximum(count, 1.0), np.nan)
