"""A pen with the model's process in it and, at times, a neighbour beside it, as the trials drive them."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import msgspec

from psi_kv_governor.bench import load
from psi_kv_governor.bench.children import Child, Children
from psi_kv_governor.bench.messages import Variant
from psi_kv_governor.bench.pen import Pen, Swap
from psi_kv_governor.bench.scene import drop_file_cache
from psi_kv_governor.bench.script import MIB
from psi_kv_governor.bench.trials import messages, worker
from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.events import Trimmed

MB = 1_000_000
_POLL_S = 0.1
_DECODER: msgspec.json.Decoder[messages.Message] = msgspec.json.Decoder(messages.Message)
_M = TypeVar("_M", bound=messages.Message)


class ModelKilledError(PsiKvError):
    """The kernel killed the model's process for want of memory."""


class SilentError(PsiKvError):
    """The model's process did not say in time what it was waited for."""


class Said(msgspec.Struct, frozen=True):
    """A line of the neighbour (`load.Reporter.say`)."""

    event: str
    time_s: float
    taken_bytes: int
    work_bytes: int


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """The model's process, whatever pen it is in."""

    model: str
    context_tokens: int
    prompt_tokens: int = 0
    """Of the prompt that `prefill` decodes after the context."""
    threads: int = 1
    mmap: bool = True
    """Whether the weights are a mapped file, as is the default of llama.cpp, or read into memory."""
    state: str = ""
    """File with the context, decoded once."""
    budget_per_min: float | None = None

    def argv(self, variant: Variant, *, fill: bool = False) -> list[str]:
        """The command of the process."""
        argv = [sys.executable, "-m", worker.__name__, "--variant", variant, "--model", self.model]
        argv += ["--context", str(self.context_tokens), "--prompt", str(self.prompt_tokens)]
        argv += ["--threads", str(self.threads), "--state", self.state]
        argv += ["--budget", str(self.budget_per_min)] if self.budget_per_min is not None else []
        argv += [] if self.mmap else ["--no-mmap"]
        return [*argv, "--fill"] if fill else argv


class Host:
    """A context manager. Everything in it is gone when it is left, or when this process is killed.

    Raises PsiKvError where no pen can be made.
    """

    def __init__(
        self, argv: Sequence[str], model: Path, limit_bytes: int, swap: Swap = "none", swap_bytes: int = 0
    ) -> None:
        drop_file_cache(model)  # so that the weights are read, and charged, in this pen
        self._stack = ExitStack()
        try:
            pen = Pen(limit_bytes, swap=swap, swap_bytes=swap_bytes if swap == "zram" else 0)
            self.pen = self._stack.enter_context(pen)
            self._children = self._stack.enter_context(Children(self.pen.popen))
            self._worker = self._children.start(argv)
        except BaseException:
            self._stack.close()
            raise
        self._ended = False
        self._neighbour: Child | None = None
        self.given_up: list[tuple[float, int]] = []
        """(time, cells) of each trim since the process began."""
        self.said: list[Said] = []
        """What the neighbour of now, or the last one, said."""

    def __enter__(self) -> Host:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End what runs in the pen, and remove it. Safe to call twice."""
        self._stack.close()

    @property
    def pid(self) -> int:
        """The model's process."""
        return self._worker.pid

    def say(self, word: str) -> None:
        """A word to the model."""
        self._worker.say(word)

    def hear(self, timeout_s: float) -> list[messages.Message]:
        """What the model says within `timeout_s`; less when something comes. Empty once it has ended."""
        found = []
        for child, line in self._children.hear(timeout_s):
            if child is self._neighbour and line is not None:
                self.said.append(msgspec.json.decode(line, type=Said))
            elif child is self._worker and line is None:
                self._ended = True
            elif child is self._worker and line is not None:
                found.append(_checked(_DECODER.decode(line)))
                self._note(found[-1])
        return found

    def _note(self, message: messages.Message) -> None:
        if isinstance(message, messages.Governed) and isinstance(message.event, Trimmed):
            self.given_up.append((message.event.time_s, message.event.cells))

    def until(self, kind: type[_M], timeout_s: float) -> tuple[_M, list[messages.Message]]:
        """Wait for a message of `kind`; gives it, and all that was said before it.

        Raises ModelKilledError, SilentError after `timeout_s`, or PsiKvError when the process ends otherwise.
        """
        before: list[messages.Message] = []
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            for message in (heard := self.hear(_POLL_S)):
                if isinstance(message, kind):
                    return message, before + heard[: heard.index(message)]
            before += heard
            self.check_alive()
        raise SilentError(f"the model's process said nothing of {kind.__name__} in {timeout_s:.0f} s")

    def check_alive(self) -> None:
        """Raises ModelKilledError or PsiKvError when the model's process has ended."""
        if not self._ended:
            return
        status = self._worker.wait()
        if status == -signal.SIGKILL and self.pen.group.oom_kills():
            raise ModelKilledError("the kernel killed the model's process for want of memory")
        complaint = self._worker.complaint() or "it said nothing"
        raise PsiKvError(f"the model's process ended with status {status}: {complaint}")

    def model_killed(self) -> bool:
        """Whether the kernel killed the model. Raises PsiKvError when its process ended otherwise."""
        try:
            self.check_alive()
        except ModelKilledError:
            return True
        return False

    def bring_neighbour(self, n_bytes: int, rate: float) -> None:
        """Start the process that takes `n_bytes` at `rate` bytes a second (0: as fast as it can)."""
        self.said = []
        argv = [sys.executable, "-m", load.__name__, "--kind", "ramp", "--mib", str(max(1, n_bytes // MIB))]
        self._neighbour = self._children.start([*argv, "--rate-mib-s", f"{rate / MIB:.3f}"])

    def said_at(self, event: str) -> Said | None:
        """The first line of the neighbour with this `event`."""
        return next((line for line in self.said if line.event == event), None)

    def neighbour_killed(self) -> bool:
        """Whether the kernel killed the neighbour. Raises PsiKvError when it ended otherwise."""
        if self._neighbour is None or (status := self._neighbour.status()) is None:
            return False
        if status != -signal.SIGKILL:
            raise PsiKvError(f"the neighbour ended with status {status}: {self._neighbour.complaint()}")
        return True

    def end_neighbour(self) -> None:
        """Its memory is free when this returns. Safe to call without one."""
        if self._neighbour is not None:
            self._children.end(self._neighbour)
            self._neighbour = None

    def forget_peak(self) -> None:
        """VmHWM counts from now on (proc_pid_clear_refs(5)); kernels without it keep the life's peak."""
        with contextlib.suppress(OSError):
            Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def file_bytes(self) -> int:
        """Page cache that is charged to the pen: the model's weights, which can be dropped and read again."""
        text = (self.pen.group.memory / "memory.stat").read_text()
        values = dict(line.split(maxsplit=1) for line in text.splitlines())
        return int(values.get("total_cache", values.get("file", "0")))


def _checked(message: messages.Message) -> messages.Message:
    if isinstance(message, messages.Failed):
        raise (BadInputError if message.exit_status == BadInputError.exit_status else PsiKvError)(message.why)
    return message
