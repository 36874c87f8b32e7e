"""What the reaction benchmark is made of, what one onset ends with, and which token was near what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from psi_kv_governor.bench.messages import Variant
from psi_kv_governor.bench.pen import Swap
from psi_kv_governor.bench.script import MIB
from psi_kv_governor.bench.trials.messages import Token
from psi_kv_governor.errors import BadInputError

Mode = Literal["decode", "prefill", "idle"]
MODES: tuple[Mode, ...] = ("decode", "prefill", "idle")
STALL_US = 10_000
"""Of `some` since the neighbour's first byte: the first sign of need. A calm pen has a tenth of it."""
POLLS_S = (1.0, 2.0)
AFTER_S = 0.2
"""After a trim or a restore caches are cold, and pages are faulted in: tokens until then are near it."""


class LatencyOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for. None: worked out from what the model takes."""

    context_tokens: int = 4096
    onsets: int = 100
    """Of each mode."""
    control: int = 10
    """Onsets of each mode beside an ungoverned model besides: what avg10 does where nobody relieves it."""
    modes: tuple[Mode, ...] = MODES
    rate: float = 100.0
    """MB/s at which the neighbour takes memory; 0: as fast as it can."""
    limit_bytes: int | None = None
    load_bytes: int | None = None
    hold_s: float = 2.0
    """The load is held so long at least ..."""
    hold_max_s: float = 20.0
    """... and at most so long, for the first bytes to come back."""
    avg10: float = 0.10
    """Threshold (0 to 1) of the poller of avg10 that it is compared with."""
    swap: Swap = "none"
    swap_bytes: int = 512 * MIB
    prompt_tokens: int = 1024
    """Of the prompt that is decoded over and over in the mode `prefill`."""
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("context_tokens", "onsets", "prompt_tokens", "threads"):
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} = {getattr(self, name)} is not usable: give 1 or more")
        if self.control < 0:
            raise BadInputError(f"control = {self.control} is not usable: give 0 or more")
        for name in ("rate", "hold_s"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise BadInputError(f"{name} = {getattr(self, name)} is not usable: give a number from 0")
        if not self.hold_s <= self.hold_max_s < math.inf:
            raise BadInputError(f"hold_max_s = {self.hold_max_s} is not usable: give hold_s or more")
        if not 0.0 < self.avg10 <= 1.0:
            raise BadInputError(f"avg10 = {self.avg10} is not usable: give a share above 0 and up to 1")


class Near(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of each token, by what was going on while it was decoded."""

    calm: list[float]
    """Before the neighbour came."""
    trim: list[float]
    restore: list[float]
    pressed: list[float]
    """Beside the neighbour, and near neither."""


class Onset(msgspec.Struct, frozen=True, kw_only=True):
    """One time that a neighbour came. Times count from its first byte, unless they say otherwise."""

    number: int
    mode: Mode
    variant: Variant
    killed: bool
    """The model or the neighbour."""
    signal: str
    """What told first: `stall`, `headroom`, or nothing within the hold (empty)."""
    signal_s: float | None
    returned_s: float | None
    """To the end of the first trim or release that gave bytes back; None: not within the hold."""
    fell_s: float | None
    """To the first fall of the process's anonymous memory, seen from outside; None also with swap, which
    makes it fall as well."""
    poll_s: list[float | None]
    """To when a poller of avg10 would have seen its threshold, for each of POLLS_S."""
    hold_s: float
    """How long there was something to see."""
    returned_bytes: int
    trims: int
    reason: str
    """Of the first trim."""
    restore_s: float | None
    """The restore itself, after the neighbour had gone, while tokens were decoded."""
    whole: bool
    near: Near
    watch_share: float
    """Of one core, that looking at the pen took."""

    @property
    def needed(self) -> bool:
        """Whether there was anything to answer: a sign, or a governor that was earlier."""
        return self.signal_s is not None or self.returned_s is not None

    @property
    def before_sign(self) -> bool:
        """Whether bytes were back before there was a sign, or so early that there never was one."""
        if self.returned_s is None:
            return False
        return self.signal_s is None or self.returned_s <= self.signal_s

    @property
    def reaction_s(self) -> float | None:
        """From the signal to the bytes back; 0 where they were back before it. None: nothing came back."""
        if self.returned_s is None:
            return None
        return 0.0 if self.signal_s is None else max(0.0, self.returned_s - self.signal_s)

    def polled_reaction_s(self, number: int) -> float | None:
        """From the signal to what polling at POLLS_S[number] would have noticed, its own work not counted."""
        polled = self.poll_s[number]
        return None if self.signal_s is None or polled is None else polled - self.signal_s


Span = tuple[float, float]


def near(tokens: Sequence[Token], trims: Sequence[Span], restores: Sequence[Span], pressed: Span) -> Near:
    """Sort tokens by what they overlap with; `trims` and `restores` are (begin, end) of each.

    A token that overlaps both counts for the restore; what comes after the pressure and near nothing is
    left out, since the governor still settles then.
    """
    found = Near(calm=[], trim=[], restore=[], pressed=[])
    for token in tokens:
        if token.tokens != 1:
            continue
        begin, end = token.time_s - token.seconds, token.time_s
        if _overlaps(begin, end, restores):
            found.restore.append(token.seconds)
        elif _overlaps(begin, end, trims):
            found.trim.append(token.seconds)
        elif end < pressed[0]:
            found.calm.append(token.seconds)
        elif begin < pressed[1]:
            found.pressed.append(token.seconds)
    return found


def _overlaps(begin: float, end: float, spans: Sequence[Span]) -> bool:
    return any(start < end and begin < stop + AFTER_S for start, stop in spans)
