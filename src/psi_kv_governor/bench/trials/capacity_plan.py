"""What the capacity benchmark is made of, and what one probe ends with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from psi_kv_governor.bench.messages import Variant
from psi_kv_governor.bench.pen import Swap
from psi_kv_governor.bench.sampling import percentile
from psi_kv_governor.bench.script import MIB
from psi_kv_governor.errors import BadInputError

STEP_CELLS = 256
"""Lengths are multiples of this: llama.cpp pads a context to it."""

THRASH_SHARE = 0.1
"""Of the tokens per second with a short context and memory to spare. Slower than that, a pen reads the
weights again for every token: the demo model then does 4 tokens per second from a fast disk, and next to none
from a memory card. Attending to a context of 8,192 tokens alone leaves it a fifth."""
NO_LIMIT = 0
"""Limit of the probe in peace, which all others are held against."""

Ending = Literal["survived", "killed", "slow", "failed"]
"""`slow`: a chunk of the prompt, or the decoding, came at less than the asked rate: it thrashes. `failed`:
the process could not even open such a context."""


class CapacityOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for."""

    limits_bytes: tuple[int, ...] = ()
    """Of the pens; empty: the model's own need and then EXTRA_BYTES each."""
    swap: Swap = "none"
    swap_bytes: int = 512 * MIB
    most_tokens: int = 32_768
    """No longer context is tried."""
    tokens: int = 32
    """Decoded one by one at the end of each."""
    chunk: int = 128
    """Of the prompt, decoded at once: at most so many cells are new when the governor has its next say."""
    least_tokens_per_s: float | None = None
    """What comes slower has not survived; None: THRASH_SHARE of what the model does in peace."""
    resolution: float = 1.15
    """The first length that does not survive is no more than this times the longest that does."""
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("most_tokens", "tokens", "chunk", "threads"):
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} = {getattr(self, name)} is not usable: give 1 or more")
        if any(limit < 16 * MIB for limit in self.limits_bytes):
            raise BadInputError("limits are in MiB, 16 or more, separated by commas")
        if self.tokens >= STEP_CELLS:
            raise BadInputError(f"tokens = {self.tokens} is not usable: give less than {STEP_CELLS}")
        if not 1.0 < self.resolution < math.inf:
            raise BadInputError(f"resolution = {self.resolution} is not usable: give a factor above 1")
        if self.least_tokens_per_s is not None and not 0.0 < self.least_tokens_per_s < math.inf:
            raise BadInputError("the least tokens per second has to be above 0")


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """One context of one length in a pen of its own."""

    variant: Variant
    limit_bytes: int
    length: int
    ending: Ending
    why: str
    """Where it did not survive."""
    done_tokens: int
    """Of the length: how far it came."""
    prefill_tokens_per_s: float | None
    token_s: list[float]
    """Of each token that was decoded at the end."""
    peak_bytes: int
    """Most ever charged to the pen; 0 where the kernel does not keep it."""
    live_cells: int
    spilled_cells: int
    """Away, and restorable from the store."""
    lost_cells: int
    """Away, and to be computed again from their tokens."""
    returned_bytes: int
    trims: int
    last_turn: str
    """The governor's last reason, where it did not survive."""

    @property
    def tokens_per_s(self) -> float | None:
        """Decoding at the end, by the median token."""
        return 1.0 / percentile(self.token_s, 0.5) if self.token_s else None

    @property
    def live_share(self) -> float:
        """Of the context that the last token attended to."""
        return self.live_cells / self.length if self.ending == "survived" else 0.0


def longest(probes: Sequence[Probe], variant: Variant, limit_bytes: int) -> Probe | None:
    """The longest that survived; None where none did."""
    mine = [
        probe
        for probe in probes
        if (probe.variant, probe.limit_bytes, probe.ending) == (variant, limit_bytes, "survived")
    ]
    return max(mine, key=lambda probe: probe.length, default=None)
