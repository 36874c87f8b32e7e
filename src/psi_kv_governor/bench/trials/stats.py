"""Statistics of trials that end in one of two ways."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

_Z_95 = 1.959963984540054
"""Of the normal distribution, two-sided, 95 %."""


class Interval(NamedTuple):
    """Between which shares (0 to 1) the true one lies, in 95 of 100 cases."""

    low: float
    high: float


def wilson(hits: int, runs: int) -> Interval:
    """Wilson's score interval (E. B. Wilson, 1927) for `hits` in `runs`.

    Also right for 0 hits, where the usual one has no width: 0 of 200 leaves up to 1.9 %. Without runs
    nothing is known: 0 to 1. Raises ValueError for counts that can't be.
    """
    if not 0 <= hits <= runs:
        raise ValueError(f"{hits} of {runs} is no count")
    if runs == 0:
        return Interval(0.0, 1.0)
    share, square = hits / runs, _Z_95**2
    middle = (share + square / (2 * runs)) / (1 + square / runs)
    half = _Z_95 / (1 + square / runs) * math.sqrt(share * (1 - share) / runs + square / (4 * runs**2))
    low = 0.0 if hits == 0 else max(0.0, middle - half)
    return Interval(low, 1.0 if hits == runs else min(1.0, middle + half))


def speed_of(rate: float) -> float:
    """A rate as a number to sort by: 0 stands for as fast as it can."""
    return math.inf if rate == 0 else rate


def starts_to_die(killed: Mapping[float, tuple[int, int]]) -> float | None:
    """The lowest rate at which at least one run of its runs was killed; None where none was.

    `killed` has (kills, runs) by rate; rate 0 is as fast as it can, so above all others.
    """
    dying = [rate for rate, (kills, _) in killed.items() if kills]
    return min(dying, key=speed_of, default=None)


def survives_up_to(killed: Mapping[float, tuple[int, int]]) -> float | None:
    """The highest rate up to which no run at it or at any lower one was killed; None where not even one."""
    best = None
    for rate in sorted(killed, key=speed_of):
        kills, runs = killed[rate]
        if kills:
            break
        if runs:
            best = rate
    return best
