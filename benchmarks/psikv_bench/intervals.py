"""Shares and means with their 95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

RESAMPLES = 1000
"""The ends of a 95 % interval then rest on 25 resamples each."""
BLOCK_TOKENS = 16
"""Neighbouring tokens err together (one missing fact spoils a sentence), so runs of tokens are drawn and not
single ones: about a sentence."""

_Z = 1.959963984540054
"""Of the normal distribution, two-sided, 95 %."""


class Interval(msgspec.Struct, frozen=True):
    """An estimate with the ends of its 95 % confidence interval."""

    mean: float
    low: float
    high: float


class Share(msgspec.Struct, frozen=True):
    """How many of the trials hit, with Wilson's 95 % interval. Made with `share_of`."""

    hits: int
    trials: int
    low: float
    high: float

    @property
    def mean(self) -> float:
        """The share that hit; 0 without trials."""
        return self.hits / self.trials if self.trials else 0.0


def share_of(hits: int, trials: int) -> Share:
    """Wilson's score interval (E. B. Wilson, 1927) for `hits` in `trials`.

    Wilson's and not a bootstrap: where all trials hit, or none, resampling them shows no doubt at all, and
    0 of 200 leaves up to 1.9 %. Without trials nothing is known: 0 to 1. Raises ValueError for counts that
    can't be.
    """
    if not 0 <= hits <= trials:
        raise ValueError(f"{hits} of {trials} is no count")
    if trials == 0:
        return Share(0, 0, 0.0, 1.0)
    share, square = hits / trials, _Z**2
    middle = (share + square / (2 * trials)) / (1 + square / trials)
    half = _Z / (1 + square / trials) * math.sqrt(share * (1 - share) / trials + square / (4 * trials**2))
    # Rounding must not take the estimate itself out of its interval, nor the interval out of 0 to 1.
    return Share(hits, trials, max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)))


def mean_of(series: Sequence[npt.NDArray[np.float64]], seed: int = 0) -> Interval:
    """Mean of all values, with the interval of a bootstrap over series and over blocks of tokens in each.

    A series is one continuation under one seed, shape (tokens,); their lengths may differ. Raises ValueError
    without any value.
    """
    values = [one for one in series if len(one)]
    if not values:
        raise ValueError("no values to take a mean of")
    blocks = [_blocks(one) for one in values]
    generator = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = [blocks[j] for j in generator.integers(len(blocks), size=len(blocks))]
        means[i] = _redrawn_mean(drawn, generator)
    low, high = np.quantile(means, (0.025, 0.975))
    mean = float(np.concatenate(values).mean())
    return Interval(mean, min(mean, float(low)), max(mean, float(high)))


_Blocks = npt.NDArray[np.float64]
"""Sum and count of each block of tokens, shape (blocks, 2)."""


def _blocks(values: npt.NDArray[np.float64]) -> _Blocks:
    starts = np.arange(0, len(values), BLOCK_TOKENS)
    counts = np.diff(np.append(starts, len(values)))
    return np.stack((np.add.reduceat(values, starts), counts.astype(np.float64)), axis=1)


def _redrawn_mean(drawn: Sequence[_Blocks], generator: np.random.Generator) -> float:
    total, count = 0.0, 0.0
    for blocks in drawn:
        chosen = blocks[generator.integers(len(blocks), size=len(blocks))]
        total, count = total + float(chosen[:, 0].sum()), count + float(chosen[:, 1].sum())
    return total / count
