"""What is asked of the benchmark, checked, and how much of each part that makes."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from psi_kv_governor._nearest import unknown
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.policy import all_policies
from psikv_bench.fidelity import texts
from psikv_bench.fidelity.contenders import Contender, contenders
from psikv_bench.fidelity.tasks import Counts
from psikv_bench.options import Options

CacheType = Literal["f16", "q8_0", "q4_0"]
Part = Annotated[float, Meta(gt=0, lt=1)]
Count = Annotated[int, Meta(ge=1)]

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


class FidelityOptions(Options, frozen=True, kw_only=True):
    """As they are given. Empty leaves the choice to the form, quick or full."""

    policies: Annotated[tuple[str, ...], Meta(description="Which; random always joins in [all].")] = ()
    shares: Annotated[tuple[Part, ...], Meta(description="Given up, 0 to 1 [0.25,0.5,0.75].")] = ()
    ctx: Annotated[tuple[Count, ...], Meta(description="Lengths of the context [2048,4096,6144].")] = ()
    texts: Annotated[tuple[str, ...], Meta(description="By name [all that this Python has].")] = ()
    seed: Annotated[int, Meta(ge=0, description="Of random, and of what is hidden.")] = 0
    cache: Annotated[CacheType, Meta(description="Type of the cells.")] = "f16"
    weights: Annotated[str, Meta(description="f32 or file, for the distributions [f32 up to 512 MiB].")] = ""
    only: Annotated[
        tuple[str, ...],
        Meta(description="Parts: texts,steps,noise,spike,facts,chats,speed; put into FOLDER's report."),
    ] = ()

    def check(self) -> None:
        for name in self.only:
            if name not in PARTS:
                raise BadInputError(unknown("part", name, PARTS))
        if self.weights not in {"", "f32", "file"}:
            raise BadInputError(f"--weights {self.weights} is not usable: give f32 or file")


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


def plan(options: FidelityOptions, config: GovernorConfig, *, quick: bool) -> Plan:
    """The plan for `options`. Raises BadInputError for what can't be measured."""
    shares = sorted({*(options.shares or (0.25, 0.5, 0.75))})
    lengths = sorted({*(options.ctx or ((2048,) if quick else (2048, 4096, 6144)))})
    _check(shares, lengths, config)
    names = options.policies or (
        tuple(dict.fromkeys((config.policy, *QUICK_POLICIES))) if quick else tuple(all_policies())
    )
    read = options.texts or (("reference",) if quick else tuple(texts.available()))
    for name in read:
        texts.read_text(name)
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


def _check(shares: list[float], lengths: list[int], config: GovernorConfig) -> None:
    protected = config.sink_cells + config.window_cells
    least = math.ceil((protected + 2 * config.block_cells) / (1.0 - shares[-1]))
    if lengths[0] < least:
        raise BadInputError(
            f"a context of {lengths[0]} tokens is too short to give up {shares[-1]:.0%}: {protected} are "
            f"protected, so give {least} or more (--ctx), or a smaller share (--shares)"
        )
