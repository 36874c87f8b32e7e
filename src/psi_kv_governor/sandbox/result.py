"""What comes of a scene, from what was seen and said of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from psi_kv_governor.events import Released, Trimmed
from psi_kv_governor.quantile import quantile
from psi_kv_governor.sandbox import messages
from psi_kv_governor.sandbox.messages import NeighbourSaid, Stage


class SceneResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one variant did. Times of tokens are None when not one was decoded."""

    variant: str
    tokens: int
    seconds: float
    tokens_per_s: float
    calm_tokens_per_s: float
    """Before the neighbour came."""
    p50_s: float | None
    p99_s: float | None
    peak_resident_bytes: int
    """Of the model's process, from its start."""
    final_resident_bytes: int
    """After the pressure, with everything back that comes back; 0 when it was killed."""
    most_swapped_bytes: int
    """While tokens were decoded beside the neighbour."""
    bytes_returned: int
    trims: int
    first_trim_s: float | None
    """From the neighbour's start to the end of the first of them."""
    restored: bool | None
    """Whether every cell is back; None where none was given up."""
    missing_cells: int
    restored_on_request: bool
    killed: bool
    """Whether the kernel killed it for want of memory."""
    neighbour_killed: bool
    stall: float | None
    """Share of the pressed time in which something in the sandbox stood still."""


@dataclass(kw_only=True)
class Seen:
    """What was said and seen of a scene, noted as it goes. Times are of the monotonic clock."""

    variant: str
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
    stall: float | None = None
    peak_bytes: int = 0
    most_swapped_bytes: int = 0
    final_bytes: int = 0
    neighbour_killed: bool = False
    settled: messages.Settled | None = None
    """None: it was killed."""

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

    def result(self, said: Sequence[NeighbourSaid]) -> SceneResult:
        """The figures, once it is over; `said` is what the neighbour did."""
        begin_s, end_s = self.pressed_s
        seconds = end_s - begin_s if self.seconds is None else self.seconds
        token_s, settled = [token.seconds for token in self.tokens], self.settled
        return SceneResult(
            variant=self.variant,
            tokens=len(token_s),
            seconds=seconds,
            tokens_per_s=len(token_s) / seconds,
            calm_tokens_per_s=self.calm_tokens_per_s,
            p50_s=quantile(token_s, 0.5) if token_s else None,
            p99_s=quantile(token_s, 0.99) if token_s else None,
            peak_resident_bytes=self.peak_bytes,
            final_resident_bytes=self.final_bytes,
            most_swapped_bytes=self.most_swapped_bytes,
            bytes_returned=self.returned_bytes,
            trims=len(self.trim_s),
            first_trim_s=self.trim_s[0] - said[0].time_s if self.trim_s and said else None,
            restored=None if not self.trim_s else settled is not None and settled.missing_cells == 0,
            missing_cells=0 if settled is None else settled.missing_cells,
            restored_on_request=settled is not None and settled.on_request,
            killed=settled is None,
            neighbour_killed=self.neighbour_killed,
            stall=self.stall,
        )
