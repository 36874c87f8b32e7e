"""One run of the oom scene, and the rates by which runs are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from psi_kv_governor.sandbox.messages import Turned, Variant
from psikv_bench.intervals import Share
from psikv_bench.trials.sizing import Sizes


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One run: a neighbour took memory beside a model that was decoding. None: it never was."""

    number: int
    variant: Variant
    rate: float
    sizes: Sizes
    fresh: bool
    """Whether the model's process was started for this run, or had gone through others."""
    model_killed: bool
    neighbour_killed: bool
    stuck: bool
    """Neither was killed, and it went no further: not counted as a kill, and said apart."""
    seconds: float
    """From the neighbour's first byte to the end of the hold, or of one of them."""
    taken_bytes: int
    """By the neighbour, as far as it could still say."""
    token_s: list[float]
    """Of each token since the neighbour's first byte."""
    peak_bytes: int
    """Most that was resident of the model's process."""
    held_bytes: int | None
    """What was resident of it at the end of the hold; None where it was killed."""
    returned_bytes: int
    trims: int
    first_returned_s: float | None
    """From the neighbour's first byte to the governor's first bytes back."""
    least_headroom_bytes: int
    stall_s: float
    """`some` in the cgroup."""
    whole: bool | None
    """Whether every cell came back afterwards, the logits the same bits; None where the model was killed."""
    not_whole: str = ""
    """Why not: cells were away still, or differ."""
    whole_s: float | None
    trail: list[Turned]
    """The governor's last turns before a kill: what it saw and decided."""

    @property
    def died(self) -> bool:
        """Whether the kernel killed one of the two: the neighbour's death is as much a failure."""
        return self.model_killed or self.neighbour_killed


def speed_of(rate: float) -> float:
    """A rate as a number to sort by: 0 stands for as fast as it can."""
    return math.inf if rate == 0 else rate


def sorted_rates(rates: Sequence[float]) -> list[float]:
    """Slow ones first, 0 (as fast as it can) last."""
    return sorted(set(rates), key=speed_of)


def rate_words(rate: float | None) -> str:
    """A rate as it is read."""
    if rate is None:
        return "none"
    return "as fast as it can" if rate == 0 else f"{rate:g} MB/s"


def starts_to_die(killed: Mapping[float, Share]) -> float | None:
    """The lowest rate at which at least one of its runs was killed; None where none was."""
    return min((rate for rate, found in killed.items() if found.hits), key=speed_of, default=None)


def survives_up_to(killed: Mapping[float, Share]) -> float | None:
    """The highest rate up to which no run at it or at any lower one was killed; None where not even one."""
    best = None
    for rate in sorted_rates(list(killed)):
        if killed[rate].hits:
            break
        best = rate if killed[rate].trials else best
    return best
