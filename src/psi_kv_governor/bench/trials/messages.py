"""What the model's process says to the trials, a JSON line each. Times are CLOCK_MONOTONIC, one for all."""

from __future__ import annotations

import msgspec

from psi_kv_governor.events import Event


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, tag_field="message"):
    pass


class Filling(_Message, frozen=True, kw_only=True):
    """The context is being decoded."""

    done: int
    total: int


class Opened(_Message, frozen=True, kw_only=True):
    """The context is full and nothing runs."""

    cell_bytes: int
    """0 where nobody knows (the ungoverned variant)."""
    digest: str
    """Of the logits after the context and one more token: equal where no bit of the context changed."""


class Token(_Message, frozen=True, kw_only=True):
    """A token was decoded, or (`tokens` > 1) a chunk of a prompt."""

    time_s: float
    """When it was done."""
    seconds: float
    tokens: int = 1


class Governed(_Message, frozen=True, kw_only=True):
    """The governor did something."""

    event: Event
    live_cells: int
    """Cells of the context that are in the cache after it."""


class Turned(_Message, frozen=True, kw_only=True):
    """A turn of the governor's loop that was not a calm one: what it saw and what it decided."""

    time_s: float
    some: float
    full: float
    headroom_bytes: int | None
    live_cells: int
    action: str
    cells: int
    mode: str
    reason: str


class Stopped(_Message, frozen=True, kw_only=True):
    """Nothing is decoded any more."""


class Whole(_Message, frozen=True, kw_only=True):
    """What is back, after it was asked to put everything back."""

    missing_cells: int
    digest: str
    """Empty while cells are missing."""
    seconds: float


class Grown(_Message, frozen=True, kw_only=True):
    """The context is as long as it was wanted, and tokens were decoded after it."""

    live_cells: int
    spilled_cells: int
    lost_cells: int


class Failed(_Message, frozen=True, kw_only=True):
    """The process cannot go on."""

    why: str
    exit_status: int


Message = Filling | Opened | Token | Governed | Turned | Stopped | Whole | Grown | Failed
