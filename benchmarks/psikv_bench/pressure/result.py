"""What comes of a scene, with all that was seen of it on the way."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from psi_kv_governor.events import Released, Trimmed
from psi_kv_governor.quantile import quantile
from psikv_bench import messages
from psikv_bench.messages import NeighbourSaid, Stage, Variant
from psikv_bench.watch import Look, Shares, amount_at, between, shares

_FULL_STAGES = frozenset({"calm", "pressed", "restore"})
"""From when the context is full: what is before says nothing of pressure."""
_T = TypeVar("_T")


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """A look at the model's process and at the pressure, about ten times a second."""

    time_s: float
    """Since the neighbour began; since decoding began where there is none."""
    stage: Stage
    inside: Shares | None
    """Stall in the sandbox since the look before; None where no kernel says."""
    outside: Shares | None
    """The same of the whole machine, which the sandbox is a part of (/proc/pressure/memory)."""
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
    """What one variant did. Times of tokens are None when not one was decoded.

    Trims are those of the governor, or prunes of the reference.
    """

    variant: Variant
    tokens: int
    seconds: float
    tokens_per_s: float
    calm_tokens_per_s: float
    """Before the neighbour came."""
    p50_s: float | None
    p99_s: float | None
    peak_resident_bytes: int
    """Of the model's process, from its start."""
    most_swapped_bytes: int
    """While tokens were decoded beside the neighbour."""
    bytes_returned: int
    trims: int
    first_trim_s: float | None
    """From the neighbour's start to the end of the first of them."""
    restored: bool | None
    """Whether every cell is back; None where none was given up."""
    missing_cells: int
    killed: bool
    """Whether the kernel killed it for want of memory."""
    neighbour_killed: bool
    stall: float | None
    """Share of the pressed time in which something in the sandbox stood still."""
    max_s: float | None
    token_s: list[float]
    """Of each token, in order."""
    least_resident_bytes: int
    """While tokens were decoded beside the neighbour."""
    final_cells: int
    """That attention looked at when the last token was decoded."""
    neighbour_bytes_per_s: float | None
    """What the neighbour filled, touched or read while tokens were decoded; None where there was none."""
    neighbour_work: list[tuple[float, int]]
    """Its reports: time, as in `Moment`, and what it had filled, touched or read by then."""
    decoding_from_s: float
    """When decoding under pressure began, on the same axis."""
    stall_full: float | None
    """Share of the pressed time in which all in the sandbox stood still."""
    outside: Shares | None
    """Stall of the whole machine in it."""
    moments: list[Moment]
    """From when the context was full."""


@dataclass(kw_only=True)
class Seen:
    """What was said and seen of a scene, noted as it goes. Times are of the monotonic clock."""

    variant: Variant
    stages: list[tuple[float, Stage]] = field(default_factory=list)
    live: list[tuple[float, int]] = field(default_factory=list)
    """Cells that attention looks at, from when on."""
    tokens: list[messages.Token] = field(default_factory=list)
    """Decoded under pressure."""
    trim_s: list[float] = field(default_factory=list)
    """The end of each trim."""
    returned_bytes: int = 0
    calm_tokens_per_s: float = 0.0
    pressed_s: tuple[float, float] = (0.0, 0.0)
    """When decoding under pressure began and ended, by this process's clock."""
    seconds: float | None = None
    """Of decoding under pressure, by the model's own clock; None: it was killed before it could say."""
    neighbour_killed: bool = False
    settled: messages.Looked | None = None
    """With everything back that comes back; None: it was killed."""

    @property
    def stage(self) -> Stage:
        """Where it is now."""
        return self.stages[-1][1] if self.stages else "load"

    @property
    def live_cells(self) -> int:
        """Cells that attention looks at now."""
        return self.live[-1][1] if self.live else 0

    def hear(self, message: messages.Message, now_s: float) -> None:
        """Take in a message of the model."""
        match message:
            case messages.Progress():
                if message.stage != self.stage:
                    self.stages.append((now_s, message.stage))
                if message.stage == "prefill":
                    self.live.append((now_s, message.done))
            case messages.Token(tokens=1):
                self.live.append((message.time_s, self.live_cells + 1))
                if self.stage == "pressed":
                    self.tokens.append(message)
            case messages.Governed(event=event):
                self.live.append((event.time_s, message.live_cells))
                if isinstance(event, Released | Trimmed):
                    self.returned_bytes += event.bytes_returned
                if isinstance(event, Trimmed):
                    self.trim_s.append(event.time_s)


def result_of(seen: Seen, looks: Sequence[Look], said: Sequence[NeighbourSaid]) -> SceneResult:
    """The figures of a scene that is over; `said` is what the neighbour did."""
    begin_s, end_s = seen.pressed_s
    seconds = end_s - begin_s if seen.seconds is None else seen.seconds
    token_s, settled = [token.seconds for token in seen.tokens], seen.settled
    work = [(line.time_s, line.work_bytes) for line in said]
    zero_s = work[0][0] if work else begin_s
    beside = [look.memory for look in looks if begin_s <= look.time_s <= end_s and look.memory.resident_bytes]
    inside = between(looks, begin_s, end_s, inside=True)
    missing = 0 if settled is None else settled.masked_cells + settled.lost_cells
    return SceneResult(
        variant=seen.variant,
        tokens=len(token_s),
        seconds=seconds,
        tokens_per_s=len(token_s) / seconds,
        calm_tokens_per_s=seen.calm_tokens_per_s,
        p50_s=quantile(token_s, 0.5) if token_s else None,
        p99_s=quantile(token_s, 0.99) if token_s else None,
        peak_resident_bytes=max((look.memory.peak_bytes for look in looks), default=0),
        most_swapped_bytes=max((memory.swap_bytes for memory in beside), default=0),
        bytes_returned=seen.returned_bytes,
        trims=len(seen.trim_s),
        first_trim_s=seen.trim_s[0] - zero_s if seen.trim_s and work else None,
        restored=None if not seen.trim_s else settled is not None and not missing,
        missing_cells=missing,
        killed=settled is None,
        neighbour_killed=seen.neighbour_killed,
        stall=None if inside is None else inside.some,
        max_s=max(token_s, default=None),
        token_s=token_s,
        least_resident_bytes=min((memory.resident_bytes for memory in beside), default=0),
        final_cells=_at(seen.live, end_s, 0),
        neighbour_bytes_per_s=(
            (amount_at(work, end_s) - amount_at(work, begin_s)) / (end_s - begin_s) if work else None
        ),
        neighbour_work=[(time_s - zero_s, done) for time_s, done in work],
        decoding_from_s=begin_s - zero_s,
        stall_full=None if inside is None else inside.full,
        outside=between(looks, begin_s, end_s, inside=False),
        moments=list(moments(seen, looks, work, zero_s)),
    )


def moments(
    seen: Seen, looks: Sequence[Look], work: Sequence[tuple[float, int]], zero_s: float
) -> Iterator[Moment]:
    """What was to be seen at each look from when the context was full, with the time since `zero_s`."""
    ends_s = [token.time_s for token in seen.tokens]
    before: Look | None = None
    for look in looks:
        stage = _at(seen.stages, look.time_s, "load")
        if stage in _FULL_STAGES and look.memory.resident_bytes:
            count = bisect.bisect_right(ends_s, look.time_s)
            earlier = 0 if before is None else bisect.bisect_right(ends_s, before.time_s)
            new_s = [token.seconds for token in seen.tokens[earlier:count]]
            seconds = 0.0 if before is None else look.time_s - before.time_s
            yield Moment(
                time_s=look.time_s - zero_s,
                stage=stage,
                inside=shares(before and before.inside, look.inside, seconds),
                outside=shares(before and before.outside, look.outside, seconds),
                resident_bytes=look.memory.resident_bytes,
                swap_bytes=look.memory.swap_bytes,
                live_cells=_at(seen.live, look.time_s, 0),
                tokens=count,
                token_s=max(new_s, default=None),
                neighbour_bytes=_at(work, look.time_s, 0),
            )
        before = look


def _at(changes: Sequence[tuple[float, _T]], time_s: float, first: _T) -> _T:
    """What held at `time_s`: that of the last change before it."""
    place = bisect.bisect_right(changes, time_s, key=lambda change: change[0])
    return changes[place - 1][1] if place else first
