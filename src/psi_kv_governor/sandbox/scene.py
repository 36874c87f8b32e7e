"""The scene: a model decodes in a sandbox while a neighbour takes memory and keeps touching it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.model import check
from psi_kv_governor.pressure.headroom import machine_headroom
from psi_kv_governor.sandbox import messages
from psi_kv_governor.sandbox.host import MIB, Host, ModelKilledError
from psi_kv_governor.sandbox.messages import Variant
from psi_kv_governor.sandbox.process_memory import glance
from psi_kv_governor.sandbox.result import SceneResult, Seen, result_of
from psi_kv_governor.sandbox.scene_options import (
    CALM_TOKENS,
    Happened,
    OnEvent,
    SceneOptions,
    StageChanged,
    Tick,
)
from psi_kv_governor.sandbox.watch import Watcher, shares

_SILENCE_S = 300.0
"""A sandbox that is far too small makes a single step of the model last for ever."""
_OUTSIDE_SHARE = 0.25
"""Of what is available, that a neighbour outside a sandbox may take: far from any pressure."""
_LOOK_S = 0.1
"""Below it the counters of PSI get coarse."""
_TICK_S = 0.5
_RECENT_TOKENS = 10
_M = TypeVar("_M", bound=messages.Message)


def run_scene(variant: Variant, options: SceneOptions, on_event: OnEvent = lambda event: None) -> SceneResult:
    """Run one variant of the scene from beginning to end.

    Everything that it starts is gone when it returns or raises. A variant that the kernel kills is a
    result; BadInputError is raised for a file that is no model and for a neighbour that is too much for the
    machine outside a sandbox, PsiKvError where no sandbox is to be had or the model cannot be run.
    """
    check(Path(options.model))
    limit_bytes = options.limit_bytes if options.in_sandbox else None
    if limit_bytes is None:
        _check_outside(options)
    with Host(options.setup(variant), limit_bytes, options.swap, options.swap_bytes) as host:
        with Watcher(host.sandbox, host.pid, _LOOK_S) as watcher:
            scene = _Scene(variant, options, host, watcher, on_event)
            scene.play()
        return result_of(scene.seen, watcher.looks, host.said)


def outside_bytes(root: Path = Path("/")) -> int:
    """The most that a neighbour outside a sandbox may take: a quarter of what is available."""
    found = machine_headroom(root / "proc/meminfo")
    return 0 if found is None else int(found.headroom_bytes * _OUTSIDE_SHARE)


def _check_outside(options: SceneOptions) -> None:
    if options.pressed and options.pressure_bytes > (most := outside_bytes()):
        raise BadInputError(
            f"outside a sandbox the neighbour may take {most // MIB} MiB, a quarter of what is available: "
            f"{options.pressure_bytes // MIB} MiB are too much"
        )


class _Scene:
    """One run."""

    def __init__(
        self, variant: Variant, options: SceneOptions, host: Host, watcher: Watcher, on_event: OnEvent
    ) -> None:
        self._options, self._host, self._watcher, self._on_event = options, host, watcher, on_event
        self._began_s = self._heard_s = self._ticked_s = time.monotonic()
        self._ticked_look = 0
        self.seen = Seen(variant=variant)

    def play(self) -> None:
        """All of it. Raises PsiKvError where the model cannot be run."""
        options, seen = self._options, self.seen
        try:
            self._until(messages.Opened)
            self._host.order(messages.Decode(tokens=CALM_TOKENS, stage="calm"))
            seen.calm_tokens_per_s = CALM_TOKENS / self._until(messages.Done).seconds
        except ModelKilledError:
            raise PsiKvError(
                f"the model alone does not fit into {options.limit_bytes // MIB} MiB: give a higher "
                "limit or a smaller context"
            ) from None
        began_s = time.monotonic()
        try:
            if options.pressed:
                self._host.bring(options.neighbour)
                self._listen(lambda: bool(self._host.said))
            end_s = time.monotonic() + options.warmup_s
            self._listen(lambda: time.monotonic() >= end_s)
            began_s = time.monotonic()
            trim_at = options.tokens // 2 if options.gentle else None
            self._host.order(
                messages.Decode(tokens=options.tokens, max_s=options.decode_max_s, trim_at=trim_at)
            )
            seen.seconds = self._until(messages.Done).seconds
            self._dismiss(began_s)
            self._host.order(messages.Settle(max_s=0.0 if options.gentle else options.restore_max_s))
            seen.settled = self._until(messages.Settled)
            seen.final = glance(self._host.pid)
        except ModelKilledError:
            if seen.seconds is None:  # it had no time to say so
                self._dismiss(began_s)

    def _dismiss(self, began_s: float) -> None:
        """The time under pressure is over."""
        self.seen.pressed_s = began_s, time.monotonic()
        self.seen.final_cells = self.seen.live_cells
        self.seen.neighbour_killed = self._host.neighbour_killed()
        self._host.end_neighbour()

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
            for message in self._host.hear(_LOOK_S):
                self._heard_s = time.monotonic()
                self._take_in(message)
                on_message(message)
            if is_over():
                return
            self._host.check_alive()
            if time.monotonic() - self._heard_s > _SILENCE_S:
                raise PsiKvError(f"the model said nothing for {_SILENCE_S:.0f} s: give a higher limit")
            self._tick()

    def _take_in(self, message: messages.Message) -> None:
        self.seen.hear(message, self._heard_s)
        variant = self.seen.variant
        if isinstance(message, messages.Progress):
            self._on_event(
                StageChanged(variant=variant, stage=message.stage, done=message.done, total=message.total)
            )
        elif isinstance(message, messages.Governed):
            self._on_event(Happened(variant=variant, event=message.event))

    def _tick(self) -> None:
        """Say how it goes, when it is time."""
        now_s = time.monotonic()
        if now_s - self._ticked_s < _TICK_S or not self._watcher.looks:
            return
        before, self._ticked_look = self._ticked_look, len(self._watcher.looks) - 1
        early, late = self._watcher.looks[before], self._watcher.looks[self._ticked_look]
        self._ticked_s = now_s
        stall = shares(early.inside, late.inside, late.time_s - early.time_s)
        recent_s = [token.seconds for token in self.seen.tokens[-_RECENT_TOKENS:]]
        self._on_event(
            Tick(
                variant=self.seen.variant,
                elapsed_s=now_s - self._began_s,
                stall=None if stall is None else stall.some,
                resident_bytes=late.memory.resident_bytes,
                live_cells=self.seen.live_cells,
                tokens=len(self.seen.tokens),
                tokens_per_s=len(recent_s) / sum(recent_s) if recent_s else 0.0,
            )
        )
