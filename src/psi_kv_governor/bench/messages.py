"""What the worker in the pen says to the scene, a JSON line each."""

from __future__ import annotations

from typing import Literal

import msgspec

from psi_kv_governor.events import Event

Variant = Literal["fixed", "psi"]
"""`fixed`: llama_cpp.Llama as upstream has it. `psi`: the same, governed."""

Stage = Literal["load", "prefill", "calm", "pressed", "restore"]


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, tag_field="message"):
    pass


class Progress(_Message, frozen=True, kw_only=True):
    """How far a stage is."""

    stage: Stage
    done: int
    total: int


class Ready(_Message, frozen=True, kw_only=True):
    """The context is full, and some tokens were decoded in peace."""

    calm_tokens_per_s: float


class Token(_Message, frozen=True, kw_only=True):
    """A token was decoded."""

    seconds: float


class Governed(_Message, frozen=True, kw_only=True):
    """The governor did something."""

    event: Event
    live_cells: int
    """Cells of the context that are in the cache after it."""


class Decoded(_Message, frozen=True, kw_only=True):
    """All tokens were decoded, or the time for it was over."""

    seconds: float


class Settled(_Message, frozen=True, kw_only=True):
    """After the pressure: what is back."""

    missing_cells: int
    seconds: float
    """From the end of the pressure to the last cell that came back."""
    by_hand: bool
    """Whether it was asked for: the governor had not done it in time, or tokens had to be computed again."""


class Failed(_Message, frozen=True, kw_only=True):
    """The worker cannot go on."""

    why: str
    exit_status: int


Message = Progress | Ready | Token | Governed | Decoded | Settled | Failed
