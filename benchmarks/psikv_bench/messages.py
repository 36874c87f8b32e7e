"""What the process that holds a model is opened with, and what it says: a JSON line each.

Times are of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import os
from typing import Any, Literal, get_args

import msgspec

from psi_kv_governor.events import Event
from psi_kv_governor.sandbox.process_memory import Sample

Stage = Literal["load", "prefill", "calm", "pressed", "restore"]

Variant = Literal["fixed", "reference", "psi", "psi-file", "psi-memory", "file-only"]
"""`fixed`: llama_cpp.Llama as upstream has it. `reference`: the same, with the middle of its context removed
from the cache's metadata when PSI avg10 is high. `psi`: governed, with the backing that the governor chooses
by itself; `psi-file` and `psi-memory`: with that backing. `file-only`: born in a file, and nobody governs."""

VARIANTS: tuple[Variant, ...] = get_args(Variant)

_BACKINGS: dict[Variant, str] = {"psi-file": "file", "psi-memory": "memory", "file-only": "file"}
_CELLS_STEP = 256
_GGML_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}  # enum ggml_type, <ggml.h>


def is_governed(variant: Variant) -> bool:
    """Whether a governor acts in it."""
    return variant.startswith("psi")


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What the process opens. None leaves a choice to it."""

    variant: Variant
    model: str
    context_tokens: int = 0
    """Decoded before it says that it is open."""
    decoded_tokens: int = 0
    """After the context."""
    threads: int = 1
    """That decode. With one for every core, a neighbour's work alone would slow it down: ggml spins."""
    auto: bool = True
    """Whether the governor acts by itself."""
    context_cells: int | None = None
    """Cells of the cache; None: as many as the context and what is decoded after it need."""
    prompt_tokens: int = 0
    """Of the prompt that `Worker.prefill` decodes again and again."""
    prefill_threads: int | None = None
    """None: all cores, where filling the context is not what is measured."""
    batch_tokens: int = 512
    mmap: bool = True
    """Whether the weights are a mapped file, as is the default of llama.cpp, or read into memory."""
    cache: Literal["f16", "q8_0", "q4_0"] = "f16"
    state: str = ""
    """File with the context; empty: it is decoded."""
    settings: dict[str, Any] = msgspec.field(default_factory=dict)
    """Of the governor."""
    keep: int | None = None
    """First tokens that never go; None: the governor's own `sink_cells`."""
    tail: int | None = None
    """Last tokens that never go; None: the governor's own `window_cells`."""
    min_prune: int = 64
    """The reference never removes fewer tokens than this."""
    pressure_file: str = ""
    """The PSI file that the reference polls."""

    @property
    def plain(self) -> bool:
        """Whether it is llama_cpp.Llama and nothing else."""
        return self.variant in {"fixed", "reference"}

    @property
    def governed(self) -> bool:
        """Whether a governor acts in it."""
        return is_governed(self.variant)

    @property
    def cells(self) -> int:
        """Cells of the cache, as llama.cpp pads them: as many as the context and what follows it need."""
        if self.context_cells is not None:
            return self.context_cells
        wanted = self.context_tokens + max(self.decoded_tokens, self.prompt_tokens) + 1
        return -(-wanted // _CELLS_STEP) * _CELLS_STEP

    def arguments(self) -> dict[str, Any]:
        """Those of llama_cpp.Llama."""
        return {
            "n_ctx": self.cells,
            "n_threads": self.threads,
            "n_threads_batch": self.prefill_threads or os.cpu_count() or 1,
            "n_batch": self.batch_tokens,
            "type_k": _GGML_TYPES[self.cache],
            "type_v": _GGML_TYPES[self.cache],
            "use_mmap": self.mmap,
        }

    def governor_settings(self) -> dict[str, Any]:
        """Those of the governor that are not its defaults."""
        given = {
            "backing": _BACKINGS.get(self.variant),
            "sink_cells": self.keep,
            "window_cells": self.tail,
            **self.settings,
        }
        return {name: value for name, value in given.items() if value is not None}


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, tag_field="message"):
    """Something that is said."""


class Progress(Message, frozen=True, kw_only=True):
    """How far a stage is."""

    stage: Stage
    done: int
    total: int


class Opened(Message, frozen=True, kw_only=True):
    """The context is full and nothing runs."""

    cell_bytes: int
    """K and V of one token in every layer; 0 without a context."""
    digest: str
    """Of the logits after the context and one more token: equal where no bit of the context changed. Empty
    without a context."""
    memory: Sample


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


class Stopped(Message, frozen=True):
    """Nothing is decoded any more."""


class Turned(Message, frozen=True, kw_only=True):
    """A turn of the governor's loop that was not a calm one: what it saw and what it decided."""

    time_s: float
    some: float
    headroom_bytes: int | None
    live_bytes: int
    action: str
    reason: str


class Checked(Message, frozen=True, kw_only=True):
    """What is back, after it was asked to put everything back."""

    missing_cells: int
    digest: str
    """Empty while cells are missing."""


class Looked(Message, frozen=True, kw_only=True):
    """The process at one moment."""

    memory: Sample
    live_cells: int
    masked_cells: int
    """Away, and to come back bit for bit."""
    lost_cells: int
    """Away, and to be decoded again."""
    governor_cpu_s: float
    """Processor time of the governor's thread so far; 0 without one."""


Said = Progress | Opened | Token | Done | Governed | Stopped | Turned | Checked | Looked


class NeighbourSaid(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the neighbour (`load`), which has no need of this package and so no tag."""

    event: Literal["begin", "taken", "work", "end"]
    time_s: float
    taken_bytes: int
    work_bytes: int
