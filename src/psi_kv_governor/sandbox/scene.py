"""The scene: a model decodes in a sandbox while a neighbour takes memory and keeps touching it."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TypeVar

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.model import check
from psi_kv_governor.pressure.kernel_file import KernelFile
from psi_kv_governor.pressure.psi import parse_psi
from psi_kv_governor.sandbox import messages
from psi_kv_governor.sandbox.host import MIB, Host, ModelKilledError
from psi_kv_governor.sandbox.process_memory import glance
from psi_kv_governor.sandbox.result import SceneResult, Seen
from psi_kv_governor.sandbox.scene_options import CALM_TOKENS, OnEvent, SceneOptions, Tick

_SILENCE_S = 300.0
"""A sandbox that is far too small makes a single step of the model last for ever."""
_RESTORE_MAX_S = 30.0
_LOOK_S = 0.1
_TICK_S = 0.5
"""Over less, the counters of PSI are coarse."""
_RECENT_TOKENS = 10
_M = TypeVar("_M", bound=messages.Message)


def run_scene(variant: str, options: SceneOptions, on_event: OnEvent = lambda event: None) -> SceneResult:
    """Run one variant of the scene from beginning to end.

    Everything that it starts is gone when it returns or raises. A variant that the kernel kills is a
    result; BadInputError is raised for a file that is no model, PsiKvError where no sandbox is to be had or
    the model cannot be run.
    """
    check(Path(options.model))
    limit_bytes = options.limit_bytes if options.isolated else None
    with Host(options.setup(variant), limit_bytes, options.swap_bytes) as host:
        scene = Scene(variant, options, host, on_event)
        scene.play()
        return scene.seen.result(host.said)


class Scene:
    """One run."""

    def __init__(self, variant: str, options: SceneOptions, host: Host, on_event: OnEvent) -> None:
        self.seen = Seen(variant=variant)
        self._options, self._host, self._on_event = options, host, on_event
        self._heard_s = self._looked_s = self._ticked_s = time.monotonic()
        psi = None if host.sandbox is None else host.sandbox.pressure_file
        self._psi = None if psi is None else KernelFile(psi)
        self._ticked_us = _some_us(self._psi)

    def play(self) -> None:
        """All of it. Raises PsiKvError where the model cannot be run."""
        try:
            self._until(messages.Opened)
            self._host.order(messages.Decode(tokens=CALM_TOKENS, stage="calm"))
            self.seen.calm_tokens_per_s = CALM_TOKENS / self._until(messages.Done).seconds
        except ModelKilledError:
            raise PsiKvError(
                f"the model alone does not fit into {self._options.limit_bytes // MIB} MiB: give a higher "
                "limit or a smaller context"
            ) from None
        with contextlib.suppress(ModelKilledError):  # that is a result
            self._press()
            self._settle()

    def bring(self) -> None:
        """Have the neighbour begin."""
        self._host.bring(self._options.neighbour())
        while not self._host.said:
            self.hear()

    def _press(self) -> None:
        options, seen = self._options, self.seen
        began_s, began_us = time.monotonic(), _some_us(self._psi)
        with contextlib.suppress(ModelKilledError):  # it is seen again when it is to settle
            if options.pressed:
                self.bring()
            began_s, began_us = time.monotonic(), _some_us(self._psi)
            trim_at = options.tokens // 2 if options.gentle else None
            order = messages.Decode(tokens=options.tokens, max_s=options.decode_max_s, trim_at=trim_at)
            self._host.order(order)
            seen.seconds = self._until(messages.Done).seconds
        seen.pressed_s = began_s, time.monotonic()
        seen.stall = _share(began_us, _some_us(self._psi), seen.pressed_s[1] - began_s)
        seen.neighbour_killed = self._host.neighbour_killed()
        self._host.end_neighbour()

    def _settle(self) -> None:
        self._host.order(messages.Settle(max_s=0.0 if self._options.gentle else _RESTORE_MAX_S))
        self.seen.settled = self._until(messages.Settled)
        final = glance(self._host.pid)
        if final is not None:
            self.seen.peak_bytes, self.seen.final_bytes = final.peak_bytes, final.resident_bytes

    def _until(self, kind: type[_M]) -> _M:
        """Listen until the model says `kind`."""
        while True:
            for message in self.hear():
                if isinstance(message, kind):
                    return message

    def hear(self) -> list[messages.Message]:
        """Take in what is said next, and look when it is time. Raises PsiKvError where it says no more."""
        said: list[messages.Message] = self._host.hear(_LOOK_S)
        now_s = time.monotonic()
        for message in said:
            self.seen.hear(message, now_s)
            if isinstance(message, messages.Progress | messages.Governed):
                self._on_event(message)
        if said:
            self._heard_s = now_s
        else:
            self._host.check_alive()
            if now_s - self._heard_s > _SILENCE_S:
                raise PsiKvError(f"the model said nothing for {_SILENCE_S:.0f} s: give a higher limit")
        if now_s - self._looked_s >= _LOOK_S:
            self._look(now_s)
        return said

    def _look(self, now_s: float) -> None:
        """At the model's memory; and say how it goes, when it is time."""
        self._looked_s, seen = now_s, self.seen
        found = glance(self._host.pid)
        if found is None:
            return
        seen.peak_bytes = found.peak_bytes
        if seen.stage == "pressed":
            seen.most_swapped_bytes = max(seen.most_swapped_bytes, found.swap_bytes)
        seconds = now_s - self._ticked_s
        if seconds < _TICK_S:
            return
        before_us, self._ticked_us = self._ticked_us, _some_us(self._psi)
        self._ticked_s = now_s
        recent_s = [token.seconds for token in seen.tokens[-_RECENT_TOKENS:]]
        self._on_event(
            Tick(
                stall=_share(before_us, self._ticked_us, seconds),
                resident_bytes=found.resident_bytes,
                live_cells=seen.live_cells,
                tokens=len(seen.tokens),
                tokens_per_s=len(recent_s) / sum(recent_s) if recent_s else 0.0,
            )
        )


def _some_us(file: KernelFile | None) -> int | None:
    """Stall until now; None without a sandbox, or where its kernel counts none."""
    data = None if file is None else file.read()
    return None if data is None else parse_psi(data).some_us


def _share(before_us: int | None, after_us: int | None, seconds: float) -> float | None:
    if before_us is None or after_us is None or seconds <= 0.0:
        return None
    return min(1.0, max(0, after_us - before_us) / 1e6 / seconds)
