"""What a scene is made of, and what is said and seen while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec

from psi_kv_governor.events import Event
from psi_kv_governor.sandbox.load import MIB

Stage = Literal["load", "prefill", "calm", "pressed", "restore", "end"]

CALM_TOKENS = 16
"""Decoded in peace first: they warm up what is made on first use, and say what the machine can do."""

STAGES: dict[Stage, str] = {
    "load": "loading the model",
    "prefill": "filling the context",
    "calm": "decoding in peace",
    "pressed": "decoding",
    "restore": "waiting for quiet",
    "end": "done",
}
"""In words, for who looks on."""


class SceneOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the scene is made of. The defaults press a 135M model with 5,000 tokens of context."""

    model: str
    context_tokens: int = 5000
    tokens: int = 120
    """Decoded under pressure."""
    threads: int = 1
    """That decode. With one for every core, a neighbour's work alone would slow it down: ggml spins."""
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


class Said(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of the model's process: how far it is, or what its governor did."""

    time_s: float
    """Of the monotonic clock, which all processes of a machine share."""
    stage: Stage
    done: int = 0
    """Tokens of this stage."""
    total: int = 1
    event: Event | None = None
    live_cells: int = 0
    """Cells of the context that attention looks at after the event."""
    missing_cells: int = 0
    """At the end: what did not come back."""
    on_request: bool = False
    """Whether it was asked for: the governor had not done it in time."""


class Tick(msgspec.Struct, frozen=True, kw_only=True):
    """A look at the running scene, about twice a second."""

    stall: float | None
    """Share of time in which something in the sandbox stood still; None where its kernel does not say."""
    resident_bytes: int
    live_cells: int
    tokens: int
    tokens_per_s: float


OnEvent = Callable[[Said | Tick], None]
