"""What is said to the process that holds a model, and what it says: a JSON line each.

Times are of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec

from psi_kv_governor.events import Event
from psi_kv_governor.sandbox.process_memory import Sample

Variant = Literal["fixed", "reference", "psi", "psi-file", "psi-memory", "file-only"]
"""`fixed`: llama_cpp.Llama as upstream has it. `reference`: the same, with the middle of its context removed
from the cache's metadata when PSI avg10 is high. `psi`: governed, with the backing that the governor chooses
by itself; `psi-file` and `psi-memory`: with that backing. `file-only`: born in a file, and nobody governs."""

VARIANTS: tuple[Variant, ...] = get_args(Variant)

_CELLS_STEP = 256

Stage = Literal["load", "prefill", "calm", "pressed", "restore"]


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What the process opens. None leaves a choice to it."""

    variant: Variant
    model: str
    context_tokens: int = 0
    """Decoded, or loaded from `state`, before it says that it is open."""
    context_cells: int | None = None
    """Cells of the cache; None: as many as the context and what is decoded after it need."""
    decoded_tokens: int = 0
    """After the context, in one go: beyond them it goes back to the end of the context."""
    prompt_tokens: int = 0
    """Of the prompt that `Prefill` decodes again and again."""
    threads: int = 1
    """That decode. With one for every core, a neighbour's work alone would slow it down: ggml spins."""
    prefill_threads: int | None = None
    """None: all cores, where filling the context is not what is measured."""
    batch_tokens: int = 512
    mmap: bool = True
    """Whether the weights are a mapped file, as is the default of llama.cpp, or read into memory."""
    cache: Literal["f16", "q8_0", "q4_0"] = "f16"
    state: str = ""
    """File with the context; empty: it is decoded."""
    auto: bool = True
    """Whether the governor acts by itself."""
    settings: dict[str, Any] = {}
    """Of the governor."""
    keep: int | None = None
    """First tokens that never go; None: the governor's own `sink_cells`."""
    tail: int | None = None
    """Last tokens that never go; None: the governor's own `window_cells`."""
    min_prune: int = 64
    """The reference never removes fewer tokens than this."""
    pressure_file: str = ""
    """The PSI file that the reference polls; empty: that of where it runs."""

    @property
    def cells(self) -> int:
        """Cells of the cache, as llama.cpp pads them."""
        if self.context_cells is not None:
            return self.context_cells
        wanted = self.context_tokens + max(self.decoded_tokens, self.prompt_tokens) + 1
        return -(-wanted // _CELLS_STEP) * _CELLS_STEP


# -- orders ------------------------------------------------------------------------------------------------


class _Order(msgspec.Struct, frozen=True, kw_only=True, tag=True, tag_field="order"):
    pass


class Fill(_Order, frozen=True, kw_only=True):
    """Decode so many more tokens of the text. Says Token for each chunk, and Done."""

    tokens: int
    chunk: int = 512


class Decode(_Order, frozen=True, kw_only=True):
    """Decode greedily, past any end of text. Says Token for each; and Done, unless it was stopped."""

    tokens: int | None = None
    """None: until the next order."""
    max_s: float | None = None
    """None: as long as it takes."""
    stage: Stage = "pressed"
    trim_at: int | None = None
    """Number of the token before which half of what may go is trimmed."""


class Generate(_Order, frozen=True, kw_only=True):
    """A whole request of so many tokens on the prompt that is in the cache, as users make one. Says Done."""

    tokens: int
    again: int = 0
    """Of the prompt's last tokens so many are decoded anew."""


class Prefill(_Order, frozen=True):
    """Decode the same long prompt after the context, again and again, until the next order."""


class Stop(_Order, frozen=True):
    """Ends what goes on. Says Stopped."""


class Trim(_Order, frozen=True, kw_only=True):
    """Give up a fraction of what may go, and say Done."""

    fraction: float = 0.5


class Restore(_Order, frozen=True):
    """Put back what can be put back, while decoding goes on. Says nothing but the governor's event."""


class Settle(_Order, frozen=True, kw_only=True):
    """Wait so long for the governor to put everything back, then ask for it. Says Settled."""

    max_s: float


class Whole(_Order, frozen=True):
    """Cut off what was decoded, put everything back, and look at the logits. Says Checked."""


class Save(_Order, frozen=True, kw_only=True):
    """Write the context to a file, and say Done."""

    path: str


class Look(_Order, frozen=True):
    """Say Looked."""


Order = Fill | Decode | Generate | Prefill | Stop | Trim | Restore | Settle | Whole | Save | Look


# -- messages ----------------------------------------------------------------------------------------------


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, tag_field="message"):
    pass


class Progress(_Message, frozen=True, kw_only=True):
    """How far a stage is."""

    stage: Stage
    done: int
    total: int


class Opened(_Message, frozen=True, kw_only=True):
    """The context is full and nothing runs."""

    cell_bytes: int
    """K and V of one token in every layer; 0 without a context."""
    digest: str
    """Of the logits after the context and one more token: equal where no bit of the context changed. Empty
    without a context."""
    imported: Sample
    """Memory with everything imported and no model."""
    memory: Sample


class Token(_Message, frozen=True, kw_only=True):
    """A token was decoded, or (`tokens` > 1) a chunk of a prompt."""

    time_s: float
    """When it was done."""
    seconds: float
    tokens: int = 1


class Done(_Message, frozen=True, kw_only=True):
    """An order was carried out."""

    seconds: float
    cpu_s: float
    """Processor time of the whole process: the governor's thread is in it, and a neighbour's load is not."""


class Stopped(_Message, frozen=True):
    """Nothing is decoded any more."""


class Pruned(_Message, frozen=True, kw_only=True):
    """The reference method removed a range."""

    time_s: float
    cells: int
    live_cells: int
    bytes_returned: int
    """Anonymous memory and swap of the process before, less what they were after."""


class Governed(_Message, frozen=True, kw_only=True):
    """The governor did something."""

    event: Event
    live_cells: int
    """Cells of the context that attention looks at after it."""


class Turned(_Message, frozen=True, kw_only=True):
    """A turn of the governor's loop that was not a calm one: what it saw and what it decided."""

    time_s: float
    some: float
    full: float
    headroom_bytes: int | None
    live_bytes: int
    action: str
    n_bytes: int
    mode: str
    reason: str


class Settled(_Message, frozen=True, kw_only=True):
    """After the pressure: what is back."""

    missing_cells: int
    seconds: float
    """From the order to the last cell that came back."""
    on_request: bool
    """Whether it was asked for: the governor had not done it in time."""


class Checked(_Message, frozen=True, kw_only=True):
    """What is back, after it was asked to put everything back."""

    missing_cells: int
    digest: str
    """Empty while cells are missing."""
    seconds: float


class Looked(_Message, frozen=True, kw_only=True):
    """The process at one moment."""

    memory: Sample
    live_cells: int
    masked_cells: int
    """Away, and to come back bit for bit."""
    lost_cells: int
    """Away, and to be decoded again."""
    governor_cpu_s: float
    """Processor time of the governor's thread so far; 0 without one."""
    turns: int
    """Of the governor's loop so far."""
    descriptors: int
    threads: int


class Failed(_Message, frozen=True, kw_only=True):
    """The process cannot go on."""

    why: str
    exit_status: int


Message = (
    Progress
    | Opened
    | Token
    | Done
    | Stopped
    | Pruned
    | Governed
    | Turned
    | Settled
    | Checked
    | Looked
    | Failed
)


class NeighbourSaid(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the neighbour (`load`), which has no need of this package and so no tag."""

    event: Literal["begin", "taken", "work", "end"]
    time_s: float
    taken_bytes: int
    work_bytes: int
