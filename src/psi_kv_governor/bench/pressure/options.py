"""What the pressure benchmark is told, and in which order its variants take their turns."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, get_args

import msgspec

from psi_kv_governor.bench.messages import Variant
from psi_kv_governor.bench.pen import LEAST_BYTES, Swap
from psi_kv_governor.bench.script import MIB, LoadKind
from psi_kv_governor.bench.worker import CALM_TOKENS
from psi_kv_governor.errors import BadInputError

Order = Literal["fixed-first", "psi-first", "random"]
Isolate = Literal["cgroup", "host", "auto"]

VARIANTS: tuple[Variant, ...] = get_args(Variant)


class PressureOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was asked for. Raises BadInputError for what makes no sense.

    The defaults press a 135M model whose prompt fills most of its context; on two quiet cores a run takes
    about half a minute.
    """

    model: str
    ctx_size: int = 4096
    """Cells of the cache."""
    n_predict: int = 120
    """Tokens decoded under pressure."""
    prompt_tokens: int | None = None
    """None: as many as leave room for what is decoded."""
    keep: int = 64
    tail: int = 256
    min_prune: int = 64
    """These three are the reference's; the first two are the governor's sinks and window as well."""
    load: LoadKind = "memory"
    pressure_mib: int = 250
    """0: no neighbour at all."""
    pressure_step_mib: int = 25
    pressure_rate_mib_s: float = 0.0
    pressure_warmup_s: float = 0.0
    variants: tuple[Variant, ...] = VARIANTS
    variant_order: Order = "fixed-first"
    variant_cooldown_s: float = 1.0
    repeats: int = 5
    isolate: Isolate = "auto"
    memory_limit_mib: int | None = None
    """None: so that the full cache and the load together do not fit."""
    swap: Swap = "zram"
    threads: int = 1
    """With one for every core, the neighbour's work alone would slow the model down: ggml spins."""
    seed: int = 1

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):
                raise BadInputError(f"{option(name)} {value} is not usable: give {least} or more")
        if not self.variants or len(set(self.variants)) != len(self.variants):
            raise BadInputError("--variants is not usable: give each variant once, at least one")
        self._check_room()
        if self.isolate == "host" and self.memory_limit_mib is not None:
            raise BadInputError("--memory-limit-mib needs a cgroup: leave it out, or --isolate host")
        if self.pressure_rate_mib_s and self.load != "ramp":
            raise BadInputError("--pressure-rate-mib-s is for --load ramp")

    def _check_room(self) -> None:
        decoded = self.n_predict + CALM_TOKENS + 1
        if self.prompt < 1:
            raise BadInputError(
                f"--ctx-size {self.ctx_size} has no room for a prompt and {decoded} decoded tokens: "
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


_LEAST: dict[str, int] = {
    "ctx_size": 1, "n_predict": 1, "prompt_tokens": 1, "keep": 0, "tail": 1, "min_prune": 1,
    "pressure_mib": 0, "pressure_step_mib": 1, "pressure_rate_mib_s": 0, "pressure_warmup_s": 0,
    "variant_cooldown_s": 0, "repeats": 1, "memory_limit_mib": LEAST_BYTES // MIB, "threads": 1, "seed": 0,
}  # fmt: skip


def option(name: str) -> str:
    """A field's name as it is given on the command line."""
    return "--" + name.replace("_", "-")


def turns(options: PressureOptions) -> list[Sequence[Variant]]:
    """The order of the variants in each repeat. Random is drawn anew for each, from the seed."""
    given = sorted(options.variants, key=VARIANTS.index)
    if options.variant_order == "psi-first":
        given.reverse()
    if options.variant_order != "random":
        return [tuple(given)] * options.repeats
    dice = random.Random(options.seed)
    return [tuple(dice.sample(given, len(given))) for _ in range(options.repeats)]
