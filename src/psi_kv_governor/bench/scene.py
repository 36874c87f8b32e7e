"""The scene: a model decodes in a pen while a neighbour takes memory and keeps touching it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from psi_kv_governor.bench import load, messages, worker
from psi_kv_governor.bench.children import Child, Children
from psi_kv_governor.bench.messages import Stage, Variant
from psi_kv_governor.bench.pen import Pen
from psi_kv_governor.bench.sampling import Sample, percentile, sample
from psi_kv_governor.bench.script import MIB, Happened, OnEvent, SceneOptions, SceneResult, StageChanged, Tick
from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.events import Event, Released, Trimmed
from psi_kv_governor.model import check
from psi_kv_governor.pressure.psi import StallMeter

_TICK_S = 0.5
_RECENT_TOKENS = 10
_SILENCE_S = 300.0
"""A pen that is far too small makes a single step of the model last for ever."""
_DECODER: msgspec.json.Decoder[messages.Message] = msgspec.json.Decoder(messages.Message)
_M = TypeVar("_M", bound=messages.Message)


def run_scene(variant: Variant, options: SceneOptions, on_event: OnEvent = lambda event: None) -> SceneResult:
    """Run one variant of the scene from beginning to end.

    Everything that it starts is gone when it returns or raises. A variant that the kernel kills is a
    result; BadInputError is raised for a file that is no model, PsiKvError where there is no pen to be had
    or the model cannot be run.
    """
    check(Path(options.model))
    if options.gentle:
        with Children(_outside) as children:
            return _Scene(variant, options, None, children, on_event).play()
    drop_file_cache(Path(options.model))
    swap_bytes = options.swap_bytes if options.swap == "zram" else 0
    with (
        Pen(options.limit_bytes, swap=options.swap, swap_bytes=swap_bytes) as pen,
        Children(pen.popen) as children,
    ):
        return _Scene(variant, options, pen, children, on_event).play()


def _outside(argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv, **options)


def drop_file_cache(path: Path) -> None:
    """Forget the file's pages, so that they are read, and charged, in the pen (page cache belongs to the
    cgroup that touches it first). Pages that another process has mapped stay where they are."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


class _Ended(Exception):
    """The kernel killed the model."""


class _Scene:
    """One run, and what is seen of it."""

    def __init__(
        self, variant: Variant, options: SceneOptions, pen: Pen | None, children: Children, on_event: OnEvent
    ) -> None:
        self._variant, self._options, self._pen, self._on_event = variant, options, pen, on_event
        self._children = children
        self._began_s = time.monotonic()
        self._heard_s = self._ticked_s = self._began_s
        self._meter = StallMeter()
        self._stage: Stage = "load"
        self._live_cells = 0
        self._calm_tokens_per_s = 0.0
        self._token_s: list[float] = []
        self._samples: list[Sample] = []
        """Taken while tokens are decoded."""
        self._peak_bytes = 0
        self._events: list[Event] = []
        self._neighbour_s = 0.0
        self._worker = children.start(_worker_argv(variant, options))

    def play(self) -> SceneResult:
        """All of it. Raises PsiKvError where the model cannot be run."""
        try:
            self._calm_tokens_per_s = self._until(messages.Ready).calm_tokens_per_s
        except _Ended:
            raise PsiKvError(
                f"the model alone does not fit into {self._options.limit_bytes // MIB} MiB: give a higher "
                "--limit-mib or a smaller --ctx"
            ) from None
        neighbour = None if self._options.gentle else self._bring_neighbour()
        pressed = _Pressed(self._pen)
        settled, final, neighbour_killed = None, None, False
        self._worker.say("go")
        try:
            pressed.end(self._until(messages.Decoded).seconds)
            if neighbour is not None:
                neighbour_killed = _was_killed(neighbour)
                self._children.end(neighbour)
            self._worker.say("calm")
            settled = self._until(messages.Settled)
            final = self._look()
        except _Ended:
            if not pressed.seconds:
                pressed.end()
                neighbour_killed = neighbour is not None and _was_killed(neighbour)
        return self._result(pressed, settled, final, neighbour_killed)

    def _bring_neighbour(self) -> Child:
        """Start the process that takes memory; it has begun when this returns."""
        self._neighbour_s = time.monotonic()
        neighbour = self._children.start(_neighbour_argv(self._options))
        while True:
            for child, line in self._children.hear(_TICK_S):
                if child is neighbour:
                    if line is None:
                        raise PsiKvError(f"the neighbour did not start: {neighbour.complaint()}")
                    return neighbour
                self._heard(child, line)

    def _until(self, kind: type[_M]) -> _M:
        """Listen until the model says `kind`."""
        while True:
            for child, line in self._children.hear(self._ticked_s + _TICK_S - time.monotonic()):
                message = self._heard(child, line)
                if isinstance(message, kind):
                    return message
            self._tick()

    def _heard(self, child: Child, line: bytes | None) -> messages.Message | None:
        """Take in a line of the model; what the neighbour says is for those who run it by hand."""
        if child is not self._worker:
            return None
        self._heard_s = time.monotonic()
        if line is None:
            raise self._judge_end()
        message = _DECODER.decode(line)
        self._take_in(message)
        return message

    def _take_in(self, message: messages.Message) -> None:
        if isinstance(message, messages.Failed):
            raise (BadInputError if message.exit_status == 2 else PsiKvError)(message.why)
        if isinstance(message, messages.Progress):
            self._stage = message.stage
            if message.stage == "prefill":
                self._live_cells = message.done
            self._on_event(
                StageChanged(
                    variant=self._variant, stage=message.stage, done=message.done, total=message.total
                )
            )
        elif isinstance(message, messages.Token):
            self._token_s.append(message.seconds)
            self._live_cells += 1
        elif isinstance(message, messages.Governed):
            self._events.append(message.event)
            self._live_cells = message.live_cells
            self._on_event(Happened(variant=self._variant, event=message.event))

    def _judge_end(self) -> Exception:
        """What it means that the model's process is gone."""
        status = self._worker.wait()
        if status == -signal.SIGKILL and self._pen is not None and self._pen.group.oom_kills():
            return _Ended()
        complaint = self._worker.complaint() or "it said nothing"
        return PsiKvError(f"the model's process ended with status {status}: {complaint}")

    def _tick(self) -> None:
        now_s = time.monotonic()
        if now_s - self._heard_s > _SILENCE_S:
            raise PsiKvError(f"the model said nothing for {_SILENCE_S:.0f} s: give a higher --limit-mib")
        if now_s - self._ticked_s < _TICK_S:
            return
        self._ticked_s = now_s
        look = self._look()
        if look is None:
            return
        if self._stage == "pressed":
            self._samples.append(look)
        recent = self._token_s[-_RECENT_TOKENS:]
        totals = None if self._pen is None else self._pen.stall()
        self._on_event(
            Tick(
                variant=self._variant,
                elapsed_s=now_s - self._began_s,
                stall=None if totals is None else self._meter.add(now_s, totals).some,
                resident_bytes=look.resident_bytes,
                live_cells=self._live_cells,
                tokens=len(self._token_s),
                tokens_per_s=len(recent) / sum(recent) if recent else 0.0,
            )
        )

    def _look(self) -> Sample | None:
        look = sample(self._worker.pid)
        if look is not None:
            self._peak_bytes = max(self._peak_bytes, look.peak_bytes)
        return look

    def _result(
        self,
        pressed: _Pressed,
        settled: messages.Settled | None,
        final: Sample | None,
        neighbour_killed: bool,
    ) -> SceneResult:
        token_s = self._token_s
        trims = [event for event in self._events if isinstance(event, Trimmed)]
        returned = [event.bytes_returned for event in self._events if isinstance(event, (Trimmed, Released))]
        restored = None if not trims else settled is not None and settled.missing_cells == 0
        return SceneResult(
            variant=self._variant,
            tokens=len(token_s),
            seconds=pressed.seconds,
            tokens_per_s=len(token_s) / pressed.seconds,
            calm_tokens_per_s=self._calm_tokens_per_s,
            p50_s=percentile(token_s, 0.5) if token_s else None,
            p99_s=percentile(token_s, 0.99) if token_s else None,
            peak_resident_bytes=self._peak_bytes,
            final_resident_bytes=0 if final is None else final.resident_bytes,
            least_resident_bytes=min((look.resident_bytes for look in self._samples), default=0),
            most_swapped_bytes=max((look.swap_bytes for look in self._samples), default=0),
            bytes_returned=sum(returned),
            trims=len(trims),
            first_trim_s=trims[0].time_s - self._neighbour_s if trims and self._neighbour_s else None,
            restored=restored,
            missing_cells=0 if settled is None else settled.missing_cells,
            restore_s=0.0 if settled is None else settled.seconds,
            restored_by_hand=settled is not None and settled.by_hand,
            killed=settled is None,
            neighbour_killed=neighbour_killed,
            stall=pressed.stall,
        )


def _was_killed(neighbour: Child) -> bool:
    """Whether the kernel killed it. Raises PsiKvError when it ended otherwise: then nothing was pressed."""
    status = neighbour.status()
    if status not in {None, -signal.SIGKILL}:
        raise PsiKvError(f"the neighbour ended with status {status}: {neighbour.complaint()}")
    return status is not None


class _Pressed:
    """The time under pressure, by the clock and by the pen's stall counters."""

    def __init__(self, pen: Pen | None) -> None:
        self._pen = pen
        self._begin_s = time.monotonic()
        self._before = None if pen is None else pen.stall()
        self.seconds = 0.0
        self.stall: float | None = None

    def end(self, seconds: float | None = None) -> None:
        """It is over, after `seconds` by the model's own clock (None: it had no time to tell)."""
        wall_s = time.monotonic() - self._begin_s
        self.seconds = wall_s if seconds is None else seconds
        after = None if self._pen is None else self._pen.stall()
        if self._before is not None and after is not None:
            self.stall = min(1.0, max(0, after.some_us - self._before.some_us) / 1e6 / wall_s)


def _worker_argv(variant: Variant, options: SceneOptions) -> list[str]:
    argv = [sys.executable, "-m", worker.__name__, "--variant", variant, "--model", options.model]
    for name, value in (
        ("--context", options.context_tokens),
        ("--tokens", options.tokens),
        ("--threads", options.threads),
        ("--max-s", options.decode_max_s),
        ("--restore-s", options.restore_max_s),
    ):
        argv += [name, str(value)]
    return [*argv, "--by-hand"] if options.gentle else argv


def _neighbour_argv(options: SceneOptions) -> list[str]:
    argv = [sys.executable, "-m", load.__name__, "--mib", str(max(1, options.pressure_bytes // MIB))]
    step_mib = max(1, options.step_bytes // MIB)
    return [*argv, "--step-mib", str(step_mib), "--pause-s", str(options.pause_s)]
