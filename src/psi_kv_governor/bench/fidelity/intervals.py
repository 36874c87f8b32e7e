"""Means and shares with their 95 % confidence intervals."""

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

_Z = 1.959964  # 97.5 % quantile of the normal distribution


class Interval(msgspec.Struct, frozen=True):
    """An estimate with the ends of its 95 % confidence interval."""

    mean: float
    low: float
    high: float


class Share(msgspec.Struct, frozen=True):
    """How many of the trials were right, with Wilson's 95 % interval.

    Wilson's and not a bootstrap: where all trials are right, or none, resampling them shows no doubt at all.
    """

    right: int
    trials: int
    low: float
    high: float

    @property
    def mean(self) -> float:
        """The share that was right."""
        return self.right / self.trials


def share_of(outcomes: Sequence[bool]) -> Share:
    """Count `outcomes`. Raises ValueError without any."""
    trials, right = len(outcomes), sum(outcomes)
    if not trials:
        raise ValueError("no trials to take a share of")
    rate = right / trials
    centre = (rate + _Z**2 / (2 * trials)) / (1 + _Z**2 / trials)
    half = _Z / (1 + _Z**2 / trials) * math.sqrt(rate * (1 - rate) / trials + _Z**2 / (4 * trials**2))
    # Rounding must not take the estimate itself out of its interval.
    return Share(right, trials, min(rate, max(0.0, centre - half)), max(rate, min(1.0, centre + half)))


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
