"""From a value for each position to one for each block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from psi_kv_governor.cache import Range, Values
from psi_kv_governor.errors import BadInputError

__all__ = ["check_share", "highest", "ranks", "top_mean", "without_gaps"]


def check_share(name: str, share: float) -> None:
    """Raises BadInputError unless `share`, a setting of the policy `name`, is above 0 and at most 1."""
    if not 0.0 < share <= 1.0:  # also refuses NaN
        raise BadInputError(f"top_share = {share} of the policy {name} is not usable: give a share up to 1")


def top_mean(blocks: Sequence[Range], give: Callable[[Range], Values], share: float) -> Values:
    """Mean of the highest `share` of the values in each block, shape (len(blocks),); NaN where it has none.

    A fact is a handful of tokens among dull ones: the mean over a block would drown it, and its maximum
    follows a single outlier. `give` tells the values of a range of positions, of which the unknown (NaN) are
    left out.
    """
    return _each(blocks, give, lambda known: _mean_of_top(known, share))


def highest(blocks: Sequence[Range], give: Callable[[Range], Values]) -> Values:
    """Highest value in each block, shape (len(blocks),); NaN where a block has none."""
    return _each(blocks, give, lambda known: float(known.max()))


def without_gaps(scores: Values) -> Values:
    """`scores` with the median of the known in place of NaN: of what is unknown, nothing goes first or last.

    Zeros where nothing is known; equal scores go oldest first.
    """
    unknown = np.isnan(scores)
    if unknown.all():
        return np.zeros_like(scores)
    return np.where(unknown, np.median(scores[~unknown]), scores)


def ranks(scores: Values) -> Values:
    """Place of each score among the known ones, from 0 (lowest) to 1, ties by the mean; NaN stays NaN."""
    known = ~np.isnan(scores)
    placed = np.full(scores.shape, np.nan)
    values, inverse, counts = np.unique(scores[known], return_inverse=True, return_counts=True)
    middles = np.cumsum(counts) - (counts + 1) / 2
    placed[known] = middles[inverse] / max(1, int(known.sum()) - 1) if len(values) else []
    return placed


def _each(
    blocks: Sequence[Range], give: Callable[[Range], Values], pool: Callable[[Values], float]
) -> Values:
    if not blocks:
        return np.empty(0)
    span = Range(min(block.start for block in blocks), max(block.stop for block in blocks))
    values = give(span)  # once for all blocks: an engine walks over every key for its answer
    pooled = np.full(len(blocks), np.nan)
    for i, block in enumerate(blocks):
        here = values[block.start - span.start : block.stop - span.start]
        known = here[~np.isnan(here)]
        if len(known):
            pooled[i] = pool(known)
    return pooled


def _mean_of_top(known: Values, share: float) -> float:
    count = max(1, round(len(known) * share))
    return float(np.partition(known, len(known) - count)[-count:].mean())
