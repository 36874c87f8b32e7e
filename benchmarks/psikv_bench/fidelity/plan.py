"""What is asked of the benchmark, checked, and how much of each part that makes."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.policy import Policy, all_policies
from psikv_bench.fidelity import contenders, texts
from psikv_bench.fidelity.tasks import Counts
from psikv_bench.fidelity.weights import MOST_BYTES, Weights
from psikv_bench.options import Options

CacheType = Literal["f16", "q8_0", "q4_0"]
Part = Literal["texts", "spike", "facts", "chats"]
PARTS: tuple[Part, ...] = get_args(Part)
"""In the order in which they are measured."""
SPARE_CELLS = 512
"""Beyond the longest context: its continuation, questions, and what llama.cpp pads."""


class FidelityOptions(Options, frozen=True, kw_only=True):
    """As they are given. Empty leaves the choice to the form, quick or full."""

    policies: Annotated[tuple[str, ...], Meta(description="Which; random always joins in [all].")] = ()
    shares: Annotated[
        tuple[Annotated[float, Meta(gt=0, lt=1)], ...], Meta(description="Given up, 0 to 1 [0.25,0.5,0.75].")
    ] = ()
    ctx: Annotated[
        tuple[Annotated[int, Meta(ge=1)], ...], Meta(description="Lengths of the context [2048,4096,6144].")
    ] = ()
    texts: Annotated[tuple[str, ...], Meta(description="By name [all that this Python has].")] = ()
    seed: Annotated[int, Meta(ge=0, description="Of random, and of what is hidden.")] = 0
    cache: Annotated[CacheType, Meta(description="Type of the cells.")] = "f16"
    weights: Annotated[Weights, Meta(description="For the distributions [f32 up to 512 MiB].")] | None = None
    only: Annotated[
        tuple[Part, ...], Meta(description=f"Parts of {','.join(PARTS)}; more with --resume.")
    ] = ()


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured: all that the figures depend on beside the machine and the model."""

    policies: tuple[str, ...]
    shares: tuple[float, ...]
    """Given up, of all cells of the context."""
    ctx: tuple[int, ...]
    """Tokens of the context when cells are given up."""
    texts: tuple[str, ...]
    fingerprints: tuple[str, ...]
    """Of the texts: another Python brings another version."""
    seed: int
    cache: str
    """Type of the cells."""
    weights: Weights
    """Of the model for the likelihoods: "f32" is without the noise of quantised arithmetic."""
    sink_cells: int
    window_cells: int
    block_cells: int
    random_seeds: int = 3
    continuation: int = 128
    """Tokens over which distributions are compared."""
    haystacks: int = 5
    """Texts with hidden facts."""
    counts: tuple[Counts, ...] = (Counts(needles=8, keys=4), Counts(needles=8, chains=2))
    """Of the hidden facts; the texts take them in turn. Keys and chains lie apart, since each would be a
    distraction to the other."""
    chats: int = 2
    spike_tokens: int = 32
    """Of the answer, greedy."""

    @property
    def compared(self) -> list[Policy]:
        """The policies, `random` under each of its seeds."""
        return contenders.contenders(self.policies, seed=self.seed, seeds=self.random_seeds)

    @property
    def chat_tokens(self) -> int:
        """Length of a chat, about."""
        return max(1024, min(self.ctx[0], 2048))

    @property
    def n_ctx(self) -> int:
        """Cells that the context needs."""
        return max(*self.ctx, self.chat_tokens) + SPARE_CELLS


_QUICK_POLICIES = ("window", "keydiff", "attention", "hybrid")
_QUICK: dict[str, Any] = {
    "random_seeds": 2,
    "continuation": 64,
    "haystacks": 1,
    "counts": (Counts(needles=4, keys=4),),
    "chats": 1,
    "spike_tokens": 16,
}


def plan(options: FidelityOptions, config: GovernorConfig, *, quick: bool) -> Plan:
    """The plan for `options`. Raises BadInputError for what can't be measured."""
    shares = sorted({*(options.shares or (0.25, 0.5, 0.75))})
    lengths = sorted({*(options.ctx or ((2048,) if quick else (2048, 4096, 6144)))})
    _check(shares, lengths, config)
    names = options.policies or ((config.policy, *_QUICK_POLICIES) if quick else tuple(all_policies()))
    compared = contenders.contenders(names, seed=options.seed, seeds=1)
    read = tuple(dict.fromkeys(options.texts or (("reference",) if quick else texts.available())))
    return Plan(
        policies=tuple(policy.name for policy in compared),
        shares=tuple(shares),
        ctx=tuple(lengths),
        texts=read,
        fingerprints=tuple(hashlib.sha256(texts.read_text(name).encode()).hexdigest()[:12] for name in read),
        seed=options.seed,
        cache=options.cache,
        weights=options.weights or _weights(Path(options.model)),
        sink_cells=config.sink_cells,
        window_cells=config.window_cells,
        block_cells=config.block_cells,
        **(_QUICK if quick else {}),
    )


def _weights(model: Path) -> Weights:
    return "f32" if model.stat().st_size <= MOST_BYTES else "file"


def _check(shares: list[float], lengths: list[int], config: GovernorConfig) -> None:
    protected = config.sink_cells + config.window_cells
    least = math.ceil((protected + 2 * config.block_cells) / (1.0 - shares[-1]))
    if lengths[0] < least:
        raise BadInputError(
            f"a context of {lengths[0]} tokens is too short to give up {shares[-1]:.0%}: {protected} are "
            f"protected, so give {least} or more (--ctx), or a smaller share (--shares)"
        )
