"""What a scene is made of, and what is seen while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from psi_kv_governor.sandbox.children import neighbour
from psi_kv_governor.sandbox.host import MIB
from psi_kv_governor.sandbox.messages import Governed, Progress, Setup, Stage

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
    tokens: int = 120
    """Decoded under pressure."""
    threads: int = 1
    """That decode."""
    limit_bytes: int = 450 * MIB
    pressure_bytes: int = 250 * MIB
    """What the neighbour takes ..."""
    step_bytes: int = 25 * MIB
    """... in steps of this ..."""
    pause_s: float = 0.02
    """... so far apart: with swap to slow it down, it may want all of it at once."""
    swap_bytes: int = 512 * MIB
    decode_max_s: float = 120.0
    """An ungoverned run may come to a stand: this long is enough to know it."""
    gentle: bool = False
    """No sandbox and no neighbour: the governed variant is ordered to trim and to restore."""

    @classmethod
    def without_swap(cls, *, model: str, pressure_bytes: int = 220 * MIB, **others: Any) -> SceneOptions:
        """The scene for a sandbox that cannot swap: whoever passes the limit is killed, and not just slow.

        So the neighbour takes less, over six seconds. Measured: ungoverned, the model was killed after 157
        of 200 tokens; governed, it gave back 79 MiB and decoded them all at 82 % of its speed in peace.
        """
        return cls(
            model=model,
            pressure_bytes=pressure_bytes,
            swap_bytes=0,
            step_bytes=4 * MIB,
            pause_s=0.1,
            **others,
        )

    @property
    def isolated(self) -> bool:
        """Whether there is a sandbox."""
        return not self.gentle

    @property
    def pressed(self) -> bool:
        """Whether there is a neighbour."""
        return not self.gentle

    def neighbour(self) -> list[str]:
        """The command of the process that takes memory."""
        return neighbour(self.pressure_bytes // MIB, self.step_bytes // MIB, self.pause_s)

    def setup(self, variant: str) -> Setup:
        """The model's process."""
        return Setup(
            variant=variant,
            model=self.model,
            context_tokens=self.context_tokens,
            decoded_tokens=CALM_TOKENS + self.tokens,
            threads=self.threads,
            auto=not self.gentle,
        )


class Tick(msgspec.Struct, frozen=True, kw_only=True):
    """A look at the running scene, about twice a second."""

    stall: float | None
    """Share of time in which something in the sandbox stood still; None where its kernel does not say."""
    resident_bytes: int
    live_cells: int
    tokens: int
    tokens_per_s: float


SceneEvent = Progress | Governed | Tick
OnEvent = Callable[[SceneEvent], None]
