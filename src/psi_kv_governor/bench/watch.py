"""What is seen of a running scene: stalls in the pen and outside it, memory, tokens, the neighbour's work."""

from __future__ import annotations

import bisect
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from psi_kv_governor.bench import messages
from psi_kv_governor.bench.messages import Stage, Variant
from psi_kv_governor.bench.pen import Pen
from psi_kv_governor.bench.sampling import Sample, glance
from psi_kv_governor.bench.script import Happened, Moment, OnEvent, Shares, StageChanged, Tick
from psi_kv_governor.errors import BadInputError, SourceLostError
from psi_kv_governor.events import Event, Released, Trimmed
from psi_kv_governor.pressure.psi import PsiFile, PsiTotals, StallMeter

MACHINE_PRESSURE = Path("/proc/pressure/memory")

_LOOK_S = 0.1
"""Below it the counters of PSI get coarse."""
_TICK_S = 0.5
_RECENT_TOKENS = 10
_FULL_STAGES = frozenset({"calm", "pressed", "restore"})
"""From when the context is full: what is before says nothing of pressure."""


class Stalls:
    """The stall counters of a pen and of the machine, each None where no kernel keeps it."""

    def __init__(self, pen: Pen | None) -> None:
        self._pen = pen
        self._machine: PsiFile | None = None
        with contextlib.suppress(OSError, BadInputError):
            self._machine = PsiFile(MACHINE_PRESSURE)

    def inside(self) -> PsiTotals | None:
        """Of the pen."""
        return None if self._pen is None else self._pen.stall()

    def outside(self) -> PsiTotals | None:
        """Of the whole machine."""
        try:
            return None if self._machine is None else self._machine.read()
        except SourceLostError:
            return None

    def close(self) -> None:
        """Give the machine's file back."""
        if self._machine is not None:
            self._machine.close()


def shares(before: PsiTotals | None, after: PsiTotals | None, seconds: float) -> Shares | None:
    """What was lost between two looks that are `seconds` apart."""
    if before is None or after is None or seconds <= 0:
        return None
    some, full = (
        min(1.0, max(0, late - early) / 1e6 / seconds) for early, late in zip(before, after, strict=True)
    )
    return Shares(some, full)


class Span:
    """A time, with the stall counters at its two ends."""

    def __init__(self, stalls: Stalls) -> None:
        self._stalls = stalls
        self.begin_s = self.end_s = time.monotonic()
        self._before = stalls.inside(), stalls.outside()
        self.inside: Shares | None = None
        self.outside: Shares | None = None

    def end(self) -> None:
        """It is over."""
        self.end_s = time.monotonic()
        seconds = self.end_s - self.begin_s
        self.inside = shares(self._before[0], self._stalls.inside(), seconds)
        self.outside = shares(self._before[1], self._stalls.outside(), seconds)

    @property
    def seconds(self) -> float:
        """How long it was by this process's clock."""
        return self.end_s - self.begin_s


def amount_at(points: Sequence[tuple[float, int]], time_s: float) -> float:
    """What was done by `time_s`: between two reports in proportion, before the first and after the last
    what they say. `points` are (time, amount) in order, at least one."""
    after = bisect.bisect_right(points, (time_s, float("inf")))
    if after == 0:
        return points[0][1]
    if after == len(points):
        return points[-1][1]
    (early_s, early), (late_s, late) = points[after - 1], points[after]
    return early + (late - early) * (time_s - early_s) / (late_s - early_s)


class Watch:
    """Takes in what the processes of one scene say, and looks at the model's process now and then."""

    def __init__(self, variant: Variant, stalls: Stalls, pid: int, on_event: OnEvent) -> None:
        self._variant, self._stalls, self._pid, self._on_event = variant, stalls, pid, on_event
        self._began_s = self._looked_s = self._ticked_s = time.monotonic()
        self._inside, self._outside, self._of_ticks = StallMeter(), StallMeter(), StallMeter()
        self._seen_tokens = 0
        self.stage: Stage = "load"
        self.live_cells = 0
        self.token_s: list[float] = []
        self.work: list[tuple[float, int]] = []
        """Reports of the neighbour: time, and what it had filled, touched or read by then."""
        self.moments: list[Moment] = []
        """With the time of the clock."""
        self.trim_s: list[float] = []
        """The end of each trim or prune."""
        self.returned_bytes = 0
        self.peak_bytes = 0

    @property
    def due_s(self) -> float:
        """When the next look is due."""
        return self._looked_s + _LOOK_S

    def hear_neighbour(self, said: messages.NeighbourSaid) -> None:
        """Take in a line of the neighbour."""
        self.work.append((said.time_s, said.work_bytes))

    def hear(self, message: messages.Message) -> None:
        """Take in a line of the model."""
        match message:
            case messages.Progress():
                self._hear_progress(message)
            case messages.Ready():
                self.live_cells = message.live_cells
            case messages.Token():
                self.token_s.append(message.seconds)
                self.live_cells += 1
            case messages.Pruned():
                self._hear_trim(time.monotonic(), message.live_cells, message.bytes_returned)
            case messages.Governed():
                self._hear_event(message.event, message.live_cells)

    def _hear_progress(self, message: messages.Progress) -> None:
        self.stage = message.stage
        if message.stage == "prefill":
            self.live_cells = message.done
        self._on_event(
            StageChanged(variant=self._variant, stage=message.stage, done=message.done, total=message.total)
        )

    def _hear_event(self, event: Event, live_cells: int) -> None:
        if isinstance(event, Trimmed):
            self._hear_trim(event.time_s, live_cells, event.bytes_returned)
        else:
            self.live_cells = live_cells
            self.returned_bytes += event.bytes_returned if isinstance(event, Released) else 0
        self._on_event(Happened(variant=self._variant, event=event))

    def _hear_trim(self, time_s: float, live_cells: int, bytes_returned: int) -> None:
        self.live_cells = live_cells
        self.returned_bytes += bytes_returned
        self.trim_s.append(time_s)

    def look(self) -> Sample | None:
        """Look at the process, if it is still there."""
        seen = glance(self._pid)
        if seen is not None:
            self.peak_bytes = max(self.peak_bytes, seen.peak_bytes)
        return seen

    def tick(self) -> None:
        """Note what there is to be seen, when it is time."""
        now_s = time.monotonic()
        if now_s < self.due_s:
            return
        self._looked_s = now_s
        seen = self.look()
        if seen is None:
            return
        inside = self._stalls.inside()
        if self.stage in _FULL_STAGES:
            self.moments.append(self._moment(now_s, seen, inside))
        if now_s - self._ticked_s >= _TICK_S:
            self._ticked_s = now_s
            self._on_event(self._tick(now_s, seen, inside))

    def _moment(self, now_s: float, seen: Sample, inside: PsiTotals | None) -> Moment:
        new_tokens = self.token_s[self._seen_tokens :]
        self._seen_tokens = len(self.token_s)
        return Moment(
            time_s=now_s,
            stage=self.stage,
            inside=_since_last(self._inside, now_s, inside),
            outside=_since_last(self._outside, now_s, self._stalls.outside()),
            resident_bytes=seen.resident_bytes,
            swap_bytes=seen.swap_bytes,
            live_cells=self.live_cells,
            tokens=len(self.token_s),
            token_s=max(new_tokens, default=None),
            neighbour_bytes=self.work[-1][1] if self.work else 0,
        )

    def _tick(self, now_s: float, seen: Sample, inside: PsiTotals | None) -> Tick:
        recent = self.token_s[-_RECENT_TOKENS:]
        return Tick(
            variant=self._variant,
            elapsed_s=now_s - self._began_s,
            stall=None if inside is None else self._of_ticks.add(now_s, inside).some,
            resident_bytes=seen.resident_bytes,
            live_cells=self.live_cells,
            tokens=len(self.token_s),
            tokens_per_s=len(recent) / sum(recent) if recent else 0.0,
        )


def _since_last(meter: StallMeter, now_s: float, totals: PsiTotals | None) -> Shares | None:
    if totals is None:
        return None
    stall = meter.add(now_s, totals)
    return Shares(stall.some, stall.full)
