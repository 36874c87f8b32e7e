"""What is asked of the benchmark, checked, and how much of each part that makes."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
from psikv_bench.fidelity import texts
from psikv_bench.fidelity.contenders import Contender, contenders
from psikv_bench.fidelity.subject import CacheType
from psikv_bench.fidelity.tasks import Counts
from psikv_bench.fidelity.weights import Weights

from psi_kv_governor._nearest import unknown
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.policy import all_policies

PARTS = {
    "texts": "distributions and perplexity over texts",
    "steps": "giving up in steps and at once",
    "noise": "what the arithmetic alone makes of a distribution",
    "spike": "answers before, during and after a spike",
    "facts": "hidden facts",
    "chats": "chats that the governor trims",
    "speed": "decode speed after half was given up",
}
"""By name, in the order in which they are measured."""
SPARE_CELLS = 512
"""Beyond the longest context: its continuation, questions, and what llama.cpp pads."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """As they are given. None or empty leaves the choice to the form, quick or full."""

    model: Path
    quick: bool = False
    policies: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()
    ctx: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    seed: int = 0
    threads: int | None = None
    cache: CacheType = "f16"
    weights: Weights | None = None
    only: tuple[str, ...] = ()
    """Parts; empty for all."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured."""

    compared: list[Contender]
    shares: list[float]
    ctx: list[int]
    texts: list[str]
    seed: int
    random_seeds: int
    continuation: int
    """Tokens over which distributions are compared."""
    gradual_texts: int
    haystacks: int
    """Texts with hidden facts."""
    haystack_tokens: int
    counts: tuple[Counts, ...]
    """Of the hidden facts; the texts take them in turn. Keys and chains lie apart, since each would be a
    distraction to the other."""
    chats: int
    chat_tokens: int
    spike_tokens: int
    """Of the answer, greedy."""
    speed_turns: int

    @property
    def names(self) -> list[str]:
        """The policies' names."""
        return [one.name for one in self.compared]

    @property
    def n_ctx(self) -> int:
        """Cells that the context needs."""
        return max(*self.ctx, self.haystack_tokens, self.chat_tokens) + SPARE_CELLS


QUICK_POLICIES = ("window", "keydiff", "attention", "hybrid")


_COUNTS = (Counts(needles=8, keys=4), Counts(needles=8, chains=2))


def plan(options: Options, config: GovernorConfig) -> Plan:
    """The plan for `options`. Raises BadInputError for what can't be measured."""
    quick = options.quick
    shares = sorted({*(options.shares or (0.25, 0.5, 0.75))})
    lengths = sorted({*(options.ctx or ((2048,) if quick else (2048, 4096, 6144)))})
    _check(shares, lengths, options.seed, config)
    names = options.policies or (
        tuple(dict.fromkeys((config.policy, *QUICK_POLICIES))) if quick else tuple(all_policies())
    )
    read = options.texts or (("reference",) if quick else tuple(texts.available()))
    for name in read:
        texts.read_text(name)
    for name in options.only:
        if name not in PARTS:
            raise BadInputError(unknown("part", name, PARTS))
    return Plan(
        compared=contenders(names, seed=options.seed, seeds=2 if quick else 3),
        shares=shares,
        ctx=lengths,
        texts=list(dict.fromkeys(read)),
        seed=options.seed,
        random_seeds=2 if quick else 3,
        continuation=64 if quick else 128,
        gradual_texts=1 if quick else 3,
        haystacks=1 if quick else 5,
        haystack_tokens=lengths[0],
        counts=(Counts(needles=4, keys=4),) if quick else _COUNTS,
        chats=1 if quick else 2,
        chat_tokens=max(1024, min(lengths[0], 2048)),
        spike_tokens=16 if quick else 32,
        speed_turns=5 if quick else 15,
    )


def _check(shares: list[float], lengths: list[int], seed: int, config: GovernorConfig) -> None:
    for share in shares:
        if not 0.0 < share < 1.0:  # also refuses NaN
            raise BadInputError(
                f"a share of {share:g} is not usable: give shares of the context between 0 and 1"
            )
    if seed < 0:
        raise BadInputError(f"a seed of {seed} is not usable: give 0 or more")
    protected = config.sink_cells + config.window_cells
    least = math.ceil((protected + 2 * config.block_cells) / (1.0 - shares[-1]))
    if lengths[0] < least:
        raise BadInputError(
            f"a context of {lengths[0]} tokens is too short to give up {shares[-1]:.0%}: {protected} are "
            f"protected, so give {least} or more (--ctx), or a smaller share (--shares)"
        )
