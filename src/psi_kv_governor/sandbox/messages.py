"""What is said to the process that holds a model, and what it says: a JSON line each.

Times are of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import msgspec

from psi_kv_governor.events import Event

_CELLS_STEP = 256

Stage = Literal["load", "prefill", "calm", "pressed", "restore"]


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What the process opens."""

    variant: str
    """`fixed`: llama_cpp.Llama as upstream has it; `psi`: governed."""
    model: str
    context_tokens: int = 0
    """Decoded before it says that it is open."""
    decoded_tokens: int = 0
    """After the context."""
    threads: int = 1
    """That decode. With one for every core, a neighbour's work alone would slow it down: ggml spins."""
    auto: bool = True
    """Whether the governor acts by itself."""

    @property
    def plain(self) -> bool:
        """Whether it is llama_cpp.Llama and nothing else."""
        return self.variant == "fixed"

    @property
    def governed(self) -> bool:
        """Whether a governor acts in it."""
        return not self.plain

    @property
    def cells(self) -> int:
        """Cells of the cache, as llama.cpp pads them: as many as the context and what follows it need."""
        wanted = self.context_tokens + self.decoded_tokens + 1
        return -(-wanted // _CELLS_STEP) * _CELLS_STEP

    def arguments(self) -> dict[str, Any]:
        """Those of llama_cpp.Llama."""
        return {
            "n_ctx": self.cells,
            "n_threads": self.threads,
            "n_threads_batch": os.cpu_count() or 1,  # filling the context is not what is measured
            "flash_attn": True,
            "verbose": False,
        }

    def governor_settings(self) -> dict[str, Any]:
        """Those of the governor that are not its defaults."""
        return {}


# -- orders ------------------------------------------------------------------------------------------------


class Order(msgspec.Struct, frozen=True, kw_only=True, tag=True, tag_field="order"):
    """Something to do."""


class Decode(Order, frozen=True, kw_only=True):
    """Decode greedily, past any end of text: what counts is the time, not the story. Says Token for each,
    and Done."""

    tokens: int
    max_s: float | None = None
    """None: as long as it takes."""
    stage: Stage = "pressed"
    trim_at: int | None = None
    """Number of the token before which half of what may go is trimmed."""


class Settle(Order, frozen=True, kw_only=True):
    """Wait so long for the governor to put everything back, then ask for it. Says Settled."""

    max_s: float


# -- messages ----------------------------------------------------------------------------------------------


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, tag_field="message"):
    """Something that is said."""


class Progress(Message, frozen=True, kw_only=True):
    """How far a stage is."""

    stage: Stage
    done: int
    total: int


class Opened(Message, frozen=True, kw_only=True):
    """The context is full and nothing runs."""


class Token(Message, frozen=True, kw_only=True):
    """A token was decoded, or (`tokens` > 1) a chunk of a prompt."""

    time_s: float
    """When it was done."""
    seconds: float
    tokens: int = 1


class Done(Message, frozen=True, kw_only=True):
    """An order was carried out."""

    seconds: float
    cpu_s: float
    """Processor time of the whole process: the governor's thread is in it, and a neighbour's load is not."""


class Governed(Message, frozen=True, kw_only=True):
    """The governor did something."""

    event: Event
    live_cells: int
    """Cells of the context that attention looks at after it."""


class Settled(Message, frozen=True, kw_only=True):
    """After the pressure: what is back."""

    missing_cells: int
    on_request: bool
    """Whether it was asked for: the governor had not done it in time."""


Said = Progress | Opened | Token | Done | Governed | Settled


class NeighbourSaid(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the neighbour (`load`), which has no need of this package and so no tag."""

    event: str
    time_s: float
