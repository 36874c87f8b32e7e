"""What the worker in the pen says to the scene, a JSON line each."""

from __future__ import annotations

from typing import Literal

import msgspec

from psi_kv_governor.events import Event

Variant = Literal["fixed", "reference", "psi"]
"""`fixed`: llama_cpp.Llama as upstream has it. `reference`: the same, with the middle of its context removed
from the cache's metadata when PSI avg10 is high. `psi`: the same, governed."""

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
    live_cells: int


class Token(_Message, frozen=True, kw_only=True):
    """A token was decoded."""

    seconds: float


class Pruned(_Message, frozen=True, kw_only=True):
    """The reference method removed a range."""

    cells: int
    live_cells: int
    bytes_returned: int
    """Anonymous memory and swap of the process before, less what they were after."""


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


Message = Progress | Ready | Token | Pruned | Governed | Decoded | Settled | Failed


class NeighbourSaid(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the neighbour (`load`), which has no need of this package and so no tag."""

    event: Literal["begin", "taken", "work", "end"]
    time_s: float
    """Of the clock that all processes of a machine share (time.monotonic)."""
    taken_bytes: int
    work_bytes: int
