"""What the trials without swap are made of, and what one of them ends with."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from psi_kv_governor.bench.messages import Variant
from psi_kv_governor.bench.trials.messages import Turned
from psi_kv_governor.bench.trials.sizing import Sizes
from psi_kv_governor.bench.trials.stats import speed_of
from psi_kv_governor.errors import BadInputError

VARIANTS: tuple[Variant, ...] = ("fixed", "psi")
NAMES: dict[Variant, str] = {"fixed": "fixed", "psi": "governed"}
RATES = (10.0, 25.0, 50.0, 100.0, 200.0, 400.0, 800.0, 0.0)
QUICK_RATES = (50.0, 200.0, 0.0)


class OomOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for. None: worked out from what the model takes."""

    context_tokens: int = 8192
    runs: int = 20
    """In all: of both variants and all rates."""
    rates: tuple[float, ...] = RATES
    """MB/s at which the neighbour takes memory; 0: as fast as it can."""
    limit_bytes: int | None = None
    load_bytes: int | None = None
    hold_s: float = 2.0
    """How long the load is held after all of it was taken."""
    threads: int = 1
    mmap: bool = True
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("context_tokens", "runs", "threads"):
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} = {getattr(self, name)} is not usable: give 1 or more")
        if not self.rates or not all(0.0 <= rate < math.inf for rate in self.rates):
            raise BadInputError("rates are MB/s from 0 (as fast as it can), separated by commas")
        if len(set(self.rates)) != len(self.rates):
            raise BadInputError("each rate counts once: leave out what is twice in --rates")
        if not 0.0 <= self.hold_s < math.inf:
            raise BadInputError(f"hold_s = {self.hold_s} is not usable: give seconds from 0")


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
    """Neither was killed, and it went no further: not counted as a kill, and told apart."""
    seconds: float
    """From the neighbour's first byte to the end of the hold, or of one of them."""
    taken_bytes: int
    """By the neighbour, as far as it could still tell."""
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
    """`some` in the pen."""
    whole: bool | None
    """Whether every cell came back afterwards, the logits the same bits; None where the model was killed."""
    whole_s: float | None
    trail: list[Turned]
    """The governor's last turns before a kill: what it saw and decided."""


def schedule(options: OomOptions) -> Iterator[tuple[Variant, float]]:
    """The runs in their order: rounds of all rates, each by one variant and then by the other.

    The variant that begins changes from round to round, the order of the rates is drawn by the seed, and
    both variants go through the same one. A last round that is not whole has some of the rates, for both.
    """
    left = options.runs
    number = 0
    while left > 0:
        rates = random.Random(f"{options.seed} {number}").sample(options.rates, len(options.rates))
        rates = rates[: -(-left // 2)]
        order = VARIANTS if number % 2 == 0 else VARIANTS[::-1]
        for variant in order:
            for rate in rates[:left]:
                yield variant, rate
            left -= min(left, len(rates))
        number += 1


def remaining(options: OomOptions, done: Iterable[tuple[Variant, float]]) -> Iterator[tuple[Variant, float]]:
    """What of the schedule is not among those `done`: a shorter schedule ends with a round of its own."""
    counts = Counter(done)
    for run in schedule(options):
        if counts[run]:
            counts[run] -= 1
        else:
            yield run


def sorted_rates(rates: Sequence[float]) -> list[float]:
    """Slow ones first, 0 (as fast as it can) last."""
    return sorted(set(rates), key=speed_of)


def rate_words(rate: float | None) -> str:
    """A rate as it is read."""
    if rate is None:
        return "none"
    return "as fast as it can" if rate == 0 else f"{rate:g} MB/s"
