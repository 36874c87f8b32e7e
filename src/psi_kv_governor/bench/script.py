"""What a scene is made of, what is seen while it runs, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec

from psi_kv_governor.bench.messages import Stage, Variant
from psi_kv_governor.bench.pen import Swap
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.events import Event

MIB = 1 << 20

LoadKind = Literal["memory", "files", "ramp"]
"""What the neighbour does: see `load`."""


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
    keep: int | None = None
    """First tokens that never go; None: the governor's own `sink_cells`."""
    tail: int | None = None
    """Last tokens that never go; None: the governor's own `window_cells`."""
    min_prune: int | None = None
    """The reference never removes fewer tokens than this."""
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
    """Whether it is played in a pen. Outside, the machine is never filled: see `scene.outside_room_bytes`."""
    gentle: bool = False
    """No pen and no neighbour: the governed variant is trimmed and restored by hand."""

    @classmethod
    def without_swap(cls, *, model: str, pressure_bytes: int = 220 * MIB, **others: Any) -> SceneOptions:
        """The scene for a pen that cannot swap: whoever passes the limit is killed, and not just slow.

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
    def penned(self) -> bool:
        """Whether there is a pen."""
        return self.isolated and not self.gentle

    @property
    def pressed(self) -> bool:
        """Whether there is a neighbour."""
        return self.pressure_bytes > 0 and not self.gentle


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
    """Share of time in which something in the pen stood still; None where its kernel does not tell."""
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


class Shares(msgspec.Struct, frozen=True):
    """Shares of time (0 to 1) lost to stalls."""

    some: float
    full: float


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """A look at the model's process and at the pressure, about ten times a second."""

    time_s: float
    """Since the neighbour began; since decoding began where there is none."""
    stage: Stage
    inside: Shares | None
    """Stall in the pen since the look before; None where no kernel tells."""
    outside: Shares | None
    """The same of the whole machine, which the pen is a part of (/proc/pressure/memory)."""
    resident_bytes: int
    swap_bytes: int
    live_cells: int
    tokens: int
    """Decoded under pressure so far."""
    token_s: float | None
    """The longest token that ended since the look before."""
    neighbour_bytes: int
    """What the neighbour has filled, touched or read so far."""


class SceneResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one variant did. Times of tokens are None when not one was decoded."""

    variant: Variant
    tokens: int
    seconds: float
    tokens_per_s: float
    calm_tokens_per_s: float
    """Before the neighbour came."""
    p50_s: float | None
    p99_s: float | None
    max_s: float | None
    token_s: list[float]
    """Of each token, in order."""
    peak_resident_bytes: int
    """Of the model's process, from its start."""
    final_resident_bytes: int
    """After the pressure, with everything back that comes back; 0 when it was killed."""
    least_resident_bytes: int
    """While tokens were decoded beside the neighbour."""
    most_swapped_bytes: int
    bytes_returned: int
    trims: int
    """Trims of the governor, or prunes of the reference."""
    first_trim_s: float | None
    """From the neighbour's start to the end of the first of them."""
    final_cells: int
    """In the cache when the last token was decoded."""
    restored: bool | None
    """Whether every cell is back; None where none was given up."""
    missing_cells: int
    restore_s: float
    restored_by_hand: bool
    killed: bool
    """Whether the kernel killed it for want of memory."""
    neighbour_killed: bool
    neighbour_bytes_per_s: float | None
    """What the neighbour filled, touched or read while tokens were decoded; None where there was none."""
    neighbour_work: list[tuple[float, int]]
    """Its reports: time, as in `Moment`, and what it had filled, touched or read by then."""
    decoding_from_s: float
    """When decoding under pressure began, on the same axis."""
    stall: float | None
    """Share of the pressed time in which something in the pen stood still."""
    stall_full: float | None
    """The same of all in the pen at once."""
    outside: Shares | None
    """The same of the whole machine."""
    moments: list[Moment]
    """From when the context was full."""
