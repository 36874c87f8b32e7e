"""What a scene is made of, and what is seen while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec

from psi_kv_governor.errors import BadInputError
from psi_kv_governor.events import Event
from psi_kv_governor.sandbox.host import MIB, Neighbour
from psi_kv_governor.sandbox.messages import Setup, Stage, Variant
from psi_kv_governor.sandbox.sandbox import Swap

LoadKind = Literal["memory", "files", "ramp"]
"""What the neighbour does: see `load`."""

CALM_TOKENS = 16
"""Decoded in peace first: they warm up what is made on first use, and say what the machine can do."""

STAGES: dict[Stage, str] = {
    "load": "loading the model",
    "prefill": "filling the context",
    "calm": "decoding in peace",
    "pressed": "decoding",
    "restore": "waiting for quiet",
}
"""In words, for who looks on."""


class SceneOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the scene is made of. The defaults press a 135M model with 5,000 tokens of context."""

    model: str
    context_tokens: int = 5000
    context_cells: int | None = None
    """Cells of the cache; None: as few as will do."""
    tokens: int = 120
    """Decoded under pressure."""
    threads: int = 1
    """That decode. With one for every core, the neighbour's work alone would slow it down: ggml spins."""
    mmap: bool = True
    """Weights as a mapped file, or in memory."""
    keep: int | None = None
    tail: int | None = None
    min_prune: int = 64
    """These three are as in Setup."""
    limit_bytes: int = 450 * MIB
    load: LoadKind = "memory"
    pressure_bytes: int = 250 * MIB
    """What the neighbour takes, or reads; 0: there is none ..."""
    step_bytes: int = 25 * MIB
    """... in steps of this ..."""
    pause_s: float = 0.02
    """... so far apart: with swap to slow it down, it may want all of it at once."""
    rate_bytes_per_s: float = 0.0
    """Of a ramp; 0 is as fast as it can."""
    folder: str = ""
    """Where a neighbour that reads files makes them."""
    seed: int = 1
    """Of what the neighbour fills its memory with."""
    warmup_s: float = 0.0
    """The neighbour works so long before the model decodes."""
    swap: Swap = "zram"
    swap_bytes: int = 512 * MIB
    decode_max_s: float = 120.0
    """An ungoverned run may come to a stand: this long is enough to know it."""
    restore_max_s: float = 30.0
    isolated: bool = True
    """Whether it is played in a sandbox. Outside, the machine is never filled: see `outside_bytes`."""
    gentle: bool = False
    """No sandbox and no neighbour: the governed variant is ordered to trim and to restore."""

    @classmethod
    def without_swap(cls, *, model: str, pressure_bytes: int = 220 * MIB, **others: Any) -> SceneOptions:
        """The scene for a sandbox that cannot swap: whoever passes the limit is killed, and not just slow.

        So the neighbour takes less, over six seconds. Measured: ungoverned, the model was killed after 157
        of 200 tokens; governed, it gave back 79 MiB and decoded them all at 82 % of its speed in peace.
        """
        return cls(
            model=model, pressure_bytes=pressure_bytes, swap="none", step_bytes=4 * MIB, pause_s=0.1, **others
        )

    def __post_init__(self) -> None:
        for name in ("context_tokens", "tokens", "threads", "limit_bytes", "step_bytes"):
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} = {getattr(self, name)} is not usable: give 1 or more")
        for name in ("pressure_bytes", "rate_bytes_per_s", "warmup_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise BadInputError(f"{name} = {getattr(self, name)} is not usable: give 0 or more")

    @property
    def in_sandbox(self) -> bool:
        """Whether there is a sandbox."""
        return self.isolated and not self.gentle

    @property
    def pressed(self) -> bool:
        """Whether there is a neighbour."""
        return self.pressure_bytes > 0 and not self.gentle

    @property
    def neighbour(self) -> Neighbour:
        """The process that takes memory."""
        return Neighbour(
            kind=self.load,
            n_bytes=self.pressure_bytes,
            step_bytes=self.step_bytes,
            pause_s=self.pause_s,
            rate_bytes_per_s=self.rate_bytes_per_s,
            folder=self.folder,
            seed=self.seed,
        )

    def setup(self, variant: Variant) -> Setup:
        """The model's process."""
        return Setup(
            variant=variant,
            model=self.model,
            context_tokens=self.context_tokens,
            context_cells=self.context_cells,
            decoded_tokens=CALM_TOKENS + self.tokens,
            threads=self.threads,
            mmap=self.mmap,
            auto=not self.gentle,
            keep=self.keep,
            tail=self.tail,
            min_prune=self.min_prune,
        )


class StageChanged(msgspec.Struct, frozen=True, kw_only=True):
    """The scene has come this far."""

    variant: Variant
    stage: Stage
    done: int
    total: int


class Tick(msgspec.Struct, frozen=True, kw_only=True):
    """A look at the running scene, about twice a second."""

    variant: Variant
    elapsed_s: float
    stall: float | None
    """Share of time in which something in the sandbox stood still; None where its kernel does not say."""
    resident_bytes: int
    live_cells: int
    tokens: int
    tokens_per_s: float


class Happened(msgspec.Struct, frozen=True, kw_only=True):
    """The governor did something."""

    variant: Variant
    event: Event


SceneEvent = StageChanged | Tick | Happened
OnEvent = Callable[[SceneEvent], None]
