"""What the pressure scene is asked for, and in which order its variants take their turns."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import Meta

from psi_kv_governor.errors import BadInputError
from psi_kv_governor.sandbox.load import MIB
from psi_kv_governor.sandbox.sandbox import LEAST_BYTES, Swap
from psi_kv_governor.sandbox.scene_options import CALM_TOKENS
from psikv_bench.load import LoadKind
from psikv_bench.messages import Variant
from psikv_bench.options import Options, each_once, in_order

Order = Literal["fixed-first", "psi-first", "random"]
Isolate = Literal["cgroup", "host", "auto"]


class PressureOptions(Options, frozen=True, kw_only=True):
    """Everything that was asked for.

    The defaults press a 135M model whose prompt fills most of its context; on two quiet cores a run takes
    about half a minute.
    """

    ctx_size: Annotated[int, Meta(ge=1, description="Cells of the cache.")] = 4096
    n_predict: Annotated[int, Meta(ge=1, description="Tokens decoded under pressure.")] = 120
    prompt_tokens: Annotated[int, Meta(ge=1, description="Tokens before that [what fits].")] | None = None
    keep: Annotated[int, Meta(ge=0, description="First tokens that never go (reference, governed).")] = 64
    tail: Annotated[int, Meta(ge=1, description="Last tokens that never go (reference, governed).")] = 256
    min_prune: Annotated[int, Meta(ge=1, description="The reference never removes fewer tokens.")] = 64
    load: Annotated[
        LoadKind,
        Meta(description="What the neighbour does: touches memory, reads files, takes memory at a rate."),
    ] = "memory"
    pressure_mib: Annotated[int, Meta(ge=0, description="What it takes or reads; 0: no neighbour.")] = 250
    pressure_step_mib: Annotated[int, Meta(ge=1, description="How much at a time (memory, files).")] = 25
    pressure_rate_mib_s: Annotated[
        float, Meta(ge=0, description="How fast (ramp); 0: as fast as it can.")
    ] = 0.0
    pressure_warmup_s: Annotated[
        float, Meta(ge=0, description="It works so long before the model decodes.")
    ] = 0.0
    variants: Annotated[tuple[Variant, ...], Meta(description="Which of them.")] = (
        "fixed", "reference", "psi",
    )  # fmt: skip
    variant_order: Annotated[Order, Meta(description="Within each repeat; random draws anew for each.")] = (
        "fixed-first"
    )
    variant_cooldown_s: Annotated[float, Meta(ge=0, description="Pause between two runs.")] = 1.0
    repeats: Annotated[int, Meta(ge=1, description="Runs of each variant.")] = 5
    isolate: Annotated[Isolate, Meta(description="A memory cgroup for each run; host presses nothing.")] = (
        "auto"
    )
    memory_limit_mib: (
        Annotated[
            int,
            Meta(ge=LEAST_BYTES // MIB, description="Of that cgroup [cache and load do not both fit]."),
        ]
        | None
    ) = None
    swap: Annotated[Swap, Meta(description="In that cgroup: a zram device of its own, or none.")] = "zram"
    mmap: Annotated[bool, Meta(description="Weights as a mapped file, or in memory [mapped].")] = True
    seed: Annotated[
        int, Meta(ge=0, description="Of the random order, and of what fills the neighbour's memory.")
    ] = 1

    def check(self) -> None:
        each_once("variants", self.variants)
        self._check_prompt()
        if self.isolate == "host" and self.memory_limit_mib is not None:
            raise BadInputError("--memory-limit-mib needs a cgroup: leave it out, or --isolate host")
        if self.pressure_rate_mib_s and self.load != "ramp":
            raise BadInputError("--pressure-rate-mib-s is for --load ramp")

    def _check_prompt(self) -> None:
        decoded = self.n_predict + CALM_TOKENS + 1
        if self.prompt < 1:
            raise BadInputError(
                f"--ctx-size {self.ctx_size} is too small for a prompt and {decoded} decoded tokens: "
                "give a larger one, or a smaller --n-predict"
            )
        if self.prompt + decoded > self.ctx_size:
            raise BadInputError(
                f"--prompt-tokens {self.prompt} and {decoded} decoded tokens do not fit into --ctx-size "
                f"{self.ctx_size}"
            )
        if self.keep + self.tail >= self.prompt:
            raise BadInputError(
                f"--keep {self.keep} and --tail {self.tail} protect all of the prompt of {self.prompt} "
                "tokens: give smaller ones, or a larger --ctx-size"
            )

    @property
    def prompt(self) -> int:
        """Tokens in the context before anything is decoded."""
        if self.prompt_tokens is not None:
            return self.prompt_tokens
        return self.ctx_size - self.n_predict - CALM_TOKENS - 1


def turns(options: PressureOptions) -> list[Sequence[Variant]]:
    """The order of the variants in each repeat. Random is drawn anew for each, from the seed."""
    given = in_order(options.variants)
    if options.variant_order == "psi-first":
        given.reverse()
    if options.variant_order != "random":
        return [tuple(given)] * options.repeats
    dice = random.Random(options.seed)
    return [tuple(dice.sample(given, len(given))) for _ in range(options.repeats)]
