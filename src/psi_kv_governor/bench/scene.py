"""The scene: a model decodes in a pen while a neighbour takes memory and keeps touching it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from psi_kv_governor.bench import messages
from psi_kv_governor.bench.children import Child, Children
from psi_kv_governor.bench.commands import neighbour_argv, worker_argv
from psi_kv_governor.bench.messages import Variant
from psi_kv_governor.bench.outcome import Ending, result_of
from psi_kv_governor.bench.pen import Pen
from psi_kv_governor.bench.script import MIB, OnEvent, SceneOptions, SceneResult
from psi_kv_governor.bench.watch import MACHINE_PRESSURE, Span, Stalls, Watch
from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.model import check
from psi_kv_governor.pressure.headroom import machine_headroom

_SILENCE_S = 300.0
"""A pen that is far too small makes a single step of the model last for ever."""
_OUTSIDE_SHARE = 0.25
"""Of what is available, that a neighbour outside a pen may take: far from any pressure."""
_DECODER: msgspec.json.Decoder[messages.Message] = msgspec.json.Decoder(messages.Message)
_OF_NEIGHBOUR = msgspec.json.Decoder(messages.NeighbourSaid)
_M = TypeVar("_M", bound=messages.Message)


def run_scene(variant: Variant, options: SceneOptions, on_event: OnEvent = lambda event: None) -> SceneResult:
    """Run one variant of the scene from beginning to end.

    Everything that it starts is gone when it returns or raises. A variant that the kernel kills is a
    result; BadInputError is raised for a file that is no model and for a neighbour that the machine outside
    a pen has no room for, PsiKvError where there is no pen to be had or the model cannot be run.
    """
    check(Path(options.model))
    if not options.penned:
        _check_outside(options)
    with ExitStack() as stack:
        pen = None
        if options.penned:
            drop_file_cache(Path(options.model))
            swap_bytes = 0 if options.swap == "none" else options.swap_bytes
            pen = stack.enter_context(Pen(options.limit_bytes, swap=options.swap, swap_bytes=swap_bytes))
        children = stack.enter_context(Children(_outside if pen is None else pen.popen))
        stalls = Stalls(pen)
        stack.callback(stalls.close)
        return _Scene(variant, options, pen, children, stalls=stalls, on_event=on_event).play()


def _outside(argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv, **options)


def outside_room_bytes(root: Path = Path("/")) -> int:
    """The most that a neighbour outside a pen may take: a quarter of what is available."""
    room = machine_headroom(root / "proc/meminfo")
    return 0 if room is None else int(room.headroom_bytes * _OUTSIDE_SHARE)


def _check_outside(options: SceneOptions) -> None:
    if options.pressed and options.pressure_bytes > (room := outside_room_bytes()):
        raise BadInputError(
            f"outside a pen the neighbour may take {room // MIB} MiB, a quarter of what is available: "
            f"{options.pressure_bytes // MIB} MiB are too much"
        )


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
    """One run."""

    def __init__(
        self,
        variant: Variant,
        options: SceneOptions,
        pen: Pen | None,
        children: Children,
        *,
        stalls: Stalls,
        on_event: OnEvent,
    ) -> None:
        self._options, self._pen, self._children, self._stalls = options, pen, children, stalls
        self._heard_s = time.monotonic()
        pressure_file = (None if pen is None else pen.pressure_file) or MACHINE_PRESSURE
        self._worker = children.start(worker_argv(variant, options, pressure_file))
        self._neighbour: Child | None = None
        self._watch = Watch(variant, stalls, self._worker.pid, on_event)
        self._ending = Ending(variant=variant)

    def play(self) -> SceneResult:
        """All of it. Raises PsiKvError where the model cannot be run."""
        try:
            self._ending.calm_tokens_per_s = self._until(messages.Ready).calm_tokens_per_s
        except _Ended:
            raise PsiKvError(
                f"the model alone does not fit into {self._options.limit_bytes // MIB} MiB: give a higher "
                "limit or a smaller context"
            ) from None
        pressed = Span(self._stalls)
        try:
            if self._options.pressed:
                self._bring_neighbour()
            self._wait(self._options.warmup_s)
            pressed = Span(self._stalls)
            self._worker.say("go")
            self._ending.seconds = self._until(messages.Decoded).seconds
            self._dismiss_neighbour(pressed)
            self._worker.say("calm")
            self._ending.settled = self._until(messages.Settled)
            self._ending.final = self._watch.look()
        except _Ended:
            if self._ending.seconds is None:  # it had no time to tell
                self._dismiss_neighbour(pressed)
        return result_of(self._ending, pressed, self._watch)

    def _bring_neighbour(self) -> None:
        """Start the process that takes memory; it has begun when this returns."""
        self._neighbour = self._children.start(neighbour_argv(self._options))
        self._listen(lambda: bool(self._watch.work))

    def _dismiss_neighbour(self, pressed: Span) -> None:
        """The time under pressure is over."""
        pressed.end()
        self._ending.final_cells = self._watch.live_cells
        if self._neighbour is None:
            return
        self._ending.neighbour_killed = _was_killed(self._neighbour)
        for line in self._children.end(self._neighbour):
            self._watch.hear_neighbour(_OF_NEIGHBOUR.decode(line))

    def _wait(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        self._listen(lambda: time.monotonic() >= end_s)

    def _until(self, kind: type[_M]) -> _M:
        """Listen until the model says `kind`."""
        found: list[_M] = []
        self._listen(
            lambda: bool(found), lambda message: found.append(message) if isinstance(message, kind) else None
        )
        return found[0]

    def _listen(
        self,
        is_over: Callable[[], bool],
        on_message: Callable[[messages.Message], None] = lambda message: None,
    ) -> None:
        """Take in what is said until `is_over`."""
        while not is_over():
            for child, line in self._children.hear(self._watch.due_s - time.monotonic()):
                if child is self._worker:
                    on_message(self._heard(line))
                elif line is not None:
                    self._watch.hear_neighbour(_OF_NEIGHBOUR.decode(line))
                elif not self._watch.work:
                    raise PsiKvError(f"the neighbour did not start: {child.complaint()}")
            if time.monotonic() - self._heard_s > _SILENCE_S:
                raise PsiKvError(f"the model said nothing for {_SILENCE_S:.0f} s: give a higher limit")
            self._watch.tick()

    def _heard(self, line: bytes | None) -> messages.Message:
        """Take in a line of the model; None is its end."""
        self._heard_s = time.monotonic()
        if line is None:
            raise self._judge_end()
        message = _DECODER.decode(line)
        if isinstance(message, messages.Failed):
            raise (BadInputError if message.exit_status == 2 else PsiKvError)(message.why)
        self._watch.hear(message)
        return message

    def _judge_end(self) -> Exception:
        """What it means that the model's process is gone."""
        status = self._worker.wait()
        if status == -signal.SIGKILL and self._pen is not None and self._pen.group.oom_kills():
            return _Ended()
        complaint = self._worker.complaint() or "it said nothing"
        return PsiKvError(f"the model's process ended with status {status}: {complaint}")


def _was_killed(neighbour: Child) -> bool:
    """Whether the kernel killed it. Raises PsiKvError when it ended otherwise: then nothing was pressed."""
    status = neighbour.status()
    if status not in {None, -signal.SIGKILL}:
        raise PsiKvError(f"the neighbour ended with status {status}: {neighbour.complaint()}")
    return status is not None
