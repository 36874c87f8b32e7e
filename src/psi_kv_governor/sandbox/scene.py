"""The scene: a model decodes in a sandbox while a neighbour takes memory and keeps touching it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from psi_kv_governor.children import python_command
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.events import Released, Trimmed
from psi_kv_governor.model import check
from psi_kv_governor.pressure.kernel_file import KernelFile
from psi_kv_governor.pressure.psi import parse_psi
from psi_kv_governor.quantile import quantile
from psi_kv_governor.sandbox import subject
from psi_kv_governor.sandbox.children import Child, neighbour
from psi_kv_governor.sandbox.load import MIB
from psi_kv_governor.sandbox.process_memory import glance
from psi_kv_governor.sandbox.sandbox import Sandbox, drop_file_cache
from psi_kv_governor.sandbox.scene_options import CALM_TOKENS, OnEvent, Said, SceneOptions, Tick

_SILENCE_S = 300.0
"""A sandbox that is far too small makes a single step of the model last for ever."""
_LOOK_S = 0.1
_TICK_S = 0.5
"""Over less, the counters of PSI are coarse."""
_RECENT_TOKENS = 10


class SceneResult(msgspec.Struct, kw_only=True):
    """What one variant did, noted as it goes. Times of tokens are None when not one was decoded."""

    variant: str
    """`fixed`: llama_cpp.Llama as upstream has it; `psi`: governed."""
    tokens: int = 0
    seconds: float = 0.0
    """Of decoding under pressure."""
    tokens_per_s: float = 0.0
    calm_tokens_per_s: float = 0.0
    """Before the neighbour came."""
    p50_s: float | None = None
    p99_s: float | None = None
    peak_resident_bytes: int = 0
    """Of the model's process, from its start."""
    final_resident_bytes: int = 0
    """After the pressure, with everything back that comes back; 0 when it was killed."""
    most_swapped_bytes: int = 0
    """While tokens were decoded beside the neighbour."""
    bytes_returned: int = 0
    trims: int = 0
    first_trim_s: float | None = None
    """From the neighbour's start to the end of the first of them."""
    restored: bool | None = None
    """Whether every cell is back; None where none was given up."""
    missing_cells: int = 0
    restored_on_request: bool = False
    killed: bool = False
    """Whether the kernel killed it for want of memory."""
    neighbour_killed: bool = False
    stall: float | None = None
    """Share of the pressed time in which something in the sandbox stood still."""


class ModelKilledError(PsiKvError):
    """The kernel killed the model's process for want of memory."""


def check_alive(model: Child, sandbox: Sandbox | None) -> None:
    """Raises ModelKilledError, BadInputError or PsiKvError when the model's process has ended."""
    if not model.ended:
        return
    model.wait()
    if model.killed("the model's process") and sandbox is not None and sandbox.group.oom_kills():
        raise ModelKilledError("the kernel killed the model's process for want of memory")
    raise PsiKvError("the model's process was killed, and not for want of memory")


def run_scene(variant: str, options: SceneOptions, on_event: OnEvent = lambda event: None) -> SceneResult:
    """Run one variant of the scene from beginning to end.

    Everything that it starts is gone when it returns or raises. A variant that the kernel kills is a
    result; BadInputError is raised for a file that is no model, PsiKvError where no sandbox is to be had or
    the model cannot be run.
    """
    check(Path(options.model))
    words = python_command(subject.__name__, variant, msgspec.json.encode(options).decode())
    decode = msgspec.json.Decoder(Said).decode
    with contextlib.ExitStack() as stack:
        sandbox = None
        if not options.gentle:
            drop_file_cache(options.model)  # so that the weights are read, and charged, in it
            sandbox = stack.enter_context(Sandbox(options.limit_bytes, swap_bytes=options.swap_bytes))
        child = Child(words, subprocess.Popen if sandbox is None else sandbox.popen, decode)
        model = stack.enter_context(child)
        return Scene(variant, options, model, sandbox, on_event).play()


class Scene:
    """One run."""

    def __init__(
        self,
        variant: str,
        options: SceneOptions,
        model: Child,
        sandbox: Sandbox | None,
        on_event: OnEvent,
    ) -> None:
        self.result = SceneResult(variant=variant)
        self.live_cells = 0
        """Cells that attention looks at now."""
        self._options, self._model, self._sandbox, self._on_event = options, model, sandbox, on_event
        self._now = Said(time_s=0.0, stage="load")
        self._token_s: dict[str, list[float]] = {"calm": [], "pressed": []}
        self._trim_s: list[float] = []
        """When each trim was over."""
        self._neighbour_s: float | None = None
        """When it started."""
        self._heard_s = self._looked_s = self._ticked_s = time.monotonic()
        psi = None if sandbox is None else sandbox.pressure_file
        self._psi = None if psi is None else KernelFile(psi)
        self._ticked_us = self._some_us()

    def play(self) -> SceneResult:
        """All of it. Raises PsiKvError where the model cannot be run."""
        result, token_s = self.result, self._token_s["pressed"]
        try:
            self._until(lambda: self._now.stage == "calm" and self._now.done == self._now.total)
        except ModelKilledError:
            raise PsiKvError(
                f"the model alone does not fit into {self._options.limit_bytes // MIB} MiB: give a higher "
                "limit or a smaller context"
            ) from None
        result.calm_tokens_per_s = CALM_TOKENS / sum(self._token_s["calm"])
        try:
            self._press()
            self._model.send(b"all is over")
            self._until(lambda: self._now.stage == "end")
            result.missing_cells, result.restored_on_request = self._now.missing_cells, self._now.on_request
            if (final := glance(self._model.pid)) is not None:
                result.peak_resident_bytes = final.peak_bytes
                result.final_resident_bytes = final.resident_bytes
            self._model.send(b"its memory was looked at")
        except ModelKilledError:  # that is a result
            result.killed = True
        result.tokens, result.tokens_per_s = len(token_s), len(token_s) / result.seconds
        if token_s:
            result.p50_s, result.p99_s = (quantile(token_s, share) for share in (0.5, 0.99))
        if result.trims:  # one that began beside the neighbour may have ended when it had gone
            if self._neighbour_s is not None:
                result.first_trim_s = self._trim_s[0] - self._neighbour_s
            result.restored = not result.killed and not result.missing_cells
        return result

    def _press(self) -> None:
        """Decode beside the neighbour, where there is one."""
        options, result = self._options, self.result
        argv = neighbour(options.pressure_bytes // MIB, options.step_bytes // MIB, options.pause_s)
        with contextlib.ExitStack() as stack:
            beside = None
            if self._sandbox is not None:
                beside = stack.enter_context(Child(argv, self._sandbox.popen, json.loads))
                # The start of its interpreter, seconds on a busy machine, is no time beside it.
                if said := beside.hear(_SILENCE_S):
                    self._neighbour_s = said[0]["time_s"]
            began_s, began_us = time.monotonic(), self._some_us()
            self._model.send(b"decode")
            try:
                self._until(lambda: self._now.stage == "restore")
            finally:
                result.seconds = time.monotonic() - began_s
                result.stall = _share(began_us, self._some_us(), result.seconds)
                if beside is not None:
                    result.neighbour_killed = beside.killed("the neighbour")

    def _until(self, is_over: Callable[[], bool]) -> None:
        """Listen, and look when it is time. Raises PsiKvError where the model says no more."""
        while not is_over():
            said = self._model.hear(_LOOK_S)
            now_s = time.monotonic()
            for one in said:
                self._note(one)
            if said:
                self._heard_s = now_s
            else:
                check_alive(self._model, self._sandbox)
            if now_s - self._heard_s > _SILENCE_S:
                raise PsiKvError(f"the model said nothing for {_SILENCE_S:.0f} s: give a higher limit")
            if now_s - self._looked_s >= _LOOK_S:
                self._look(now_s)

    def _note(self, said: Said) -> None:
        """What the model says."""
        result, before = self.result, self._now
        if said.event is None:
            self._now = said
            if said.stage == "prefill":
                self.live_cells = said.done
            elif (said.stage, said.done) == (before.stage, before.done + 1) and said.stage in self._token_s:
                self.live_cells += 1
                self._token_s[said.stage].append(said.time_s - before.time_s)
        else:
            self.live_cells = said.live_cells
            if isinstance(said.event, Released | Trimmed):
                result.bytes_returned += said.event.bytes_returned
            if isinstance(said.event, Trimmed):
                result.trims += 1
                self._trim_s.append(said.event.time_s)
        self._on_event(said)

    def _look(self, now_s: float) -> None:
        """At the model's memory; and say how it goes, when it is time."""
        self._looked_s, result, token_s = now_s, self.result, self._token_s["pressed"]
        found = glance(self._model.pid)
        if found is None:
            return
        result.peak_resident_bytes = found.peak_bytes
        if self._now.stage == "pressed":
            result.most_swapped_bytes = max(result.most_swapped_bytes, found.swap_bytes)
        if (seconds := now_s - self._ticked_s) < _TICK_S:
            return
        before_us, self._ticked_us, self._ticked_s = self._ticked_us, self._some_us(), now_s
        recent_s = token_s[-_RECENT_TOKENS:]
        self._on_event(
            Tick(
                stall=_share(before_us, self._ticked_us, seconds),
                resident_bytes=found.resident_bytes,
                live_cells=self.live_cells,
                tokens=len(token_s),
                tokens_per_s=len(recent_s) / sum(recent_s) if recent_s else 0.0,
            )
        )

    def _some_us(self) -> int | None:
        """Stall until now; None without a sandbox, or where its kernel counts none."""
        data = None if self._psi is None else self._psi.read()
        return None if data is None else parse_psi(data).some_us


def _share(before_us: int | None, after_us: int | None, seconds: float) -> float | None:
    if before_us is None or after_us is None or seconds <= 0.0:
        return None
    return min(1.0, max(0, after_us - before_us) / 1e6 / seconds)
