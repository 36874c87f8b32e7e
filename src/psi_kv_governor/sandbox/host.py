"""The model's process, in a sandbox or outside of one, and at times a neighbour beside it."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import msgspec

from psi_kv_governor.children import python_command
from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.sandbox import load, messages, worker
from psi_kv_governor.sandbox.children import Child, Children
from psi_kv_governor.sandbox.messages import NeighbourSaid, Setup
from psi_kv_governor.sandbox.sandbox import Sandbox, Swap
from psi_kv_governor.sandbox.self_look import drop_file_cache
from psi_kv_governor.sandbox.watch import MACHINE_PRESSURE

MIB = 1 << 20

_POLL_S = 0.1
_DECODER: msgspec.json.Decoder[messages.Message] = msgspec.json.Decoder(messages.Message)
_OF_NEIGHBOUR = msgspec.json.Decoder(NeighbourSaid)
_M = TypeVar("_M", bound=messages.Message)


class ModelKilledError(PsiKvError):
    """The kernel killed the model's process for want of memory."""


class SilentError(PsiKvError):
    """The model's process did not say in time what it was waited for."""


class Neighbour(msgspec.Struct, frozen=True, kw_only=True):
    """A process that takes memory: see `load`."""

    kind: Literal["memory", "files", "ramp"] = "memory"
    n_bytes: int
    step_bytes: int = 25 * MIB
    pause_s: float = 0.02
    rate_bytes_per_s: float = 0.0
    folder: str = ""
    seed: int = 1

    def argv(self) -> list[str]:
        """The command of the process."""
        argv = python_command(load.__name__, "--kind", self.kind)
        argv += ["--mib", str(max(1, self.n_bytes // MIB)), "--step-mib", str(max(1, self.step_bytes // MIB))]
        argv += ["--pause-s", str(self.pause_s), "--rate-mib-s", f"{self.rate_bytes_per_s / MIB:.3f}"]
        return [*argv, "--seed", str(self.seed), *(["--folder", self.folder] if self.folder else [])]


class Host:
    """A context manager. Everything in it is gone when it is left, or when this process is killed.

    Without a limit there is no sandbox. Raises PsiKvError where none can be made.
    """

    def __init__(
        self, setup: Setup, limit_bytes: int | None = None, swap: Swap = "none", swap_bytes: int = 0
    ) -> None:
        self._stack = ExitStack()
        self.sandbox: Sandbox | None = None
        try:
            if limit_bytes is not None:
                drop_file_cache(Path(setup.model))  # so that the weights are read, and charged, in it
                swap_bytes = 0 if swap == "none" else swap_bytes
                sandbox = Sandbox(limit_bytes, swap=swap, swap_bytes=swap_bytes)
                self.sandbox = self._stack.enter_context(sandbox)
            setup = _watching(setup, self.sandbox)
            launch = _outside if self.sandbox is None else self.sandbox.popen
            self._children = self._stack.enter_context(Children(launch))
            setup_json = msgspec.json.encode(setup).decode()
            self._worker = self._children.start(python_command(worker.__name__, setup_json))
        except BaseException:
            self._stack.close()
            raise
        self._ended = False
        self._neighbour: Child | None = None
        self.said: list[NeighbourSaid] = []
        """What the neighbour of now, or the last one, said."""

    def __enter__(self) -> Host:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End what runs in it, and remove the sandbox. Safe to call twice."""
        self._stack.close()

    @property
    def pid(self) -> int:
        """The model's process."""
        return self._worker.pid

    # -- the model --------------------------------------------------------------------------------------

    def order(self, order: messages.Order) -> None:
        """Have the model do something."""
        self._worker.send(msgspec.json.encode(order))

    def hear(self, timeout_s: float) -> list[messages.Message]:
        """What the model says within `timeout_s`; less when something comes. Empty once it has ended.

        Raises BadInputError or PsiKvError where it can't go on.
        """
        found = []
        for child, line in self._children.hear(timeout_s):
            if child is self._worker:
                if line is None:
                    self._ended = True
                else:
                    found.append(_checked(_DECODER.decode(line)))
            elif child is self._neighbour:
                self._hear_neighbour(child, line)
        return found

    def until(
        self,
        kind: type[_M],
        timeout_s: float,
        on_other: Callable[[messages.Message], None] = lambda message: None,
    ) -> _M:
        """Wait for a message of `kind`; `on_other` hears what is said before it.

        Raises ModelKilledError, SilentError after `timeout_s`, or PsiKvError when the process ends otherwise.
        """
        deadline_s = time.monotonic() + timeout_s
        found: _M | None = None
        while time.monotonic() < deadline_s:
            for message in self.hear(_POLL_S):
                if found is None and isinstance(message, kind):
                    found = message
                else:
                    on_other(message)
            if found is not None:
                return found
            self.check_alive()
        raise SilentError(f"the model's process said nothing of {kind.__name__} in {timeout_s:.0f} s")

    def done(self, order: messages.Order, timeout_s: float) -> messages.Done:
        """Have an order carried out."""
        self.order(order)
        return self.until(messages.Done, timeout_s)

    def check_alive(self) -> None:
        """Raises ModelKilledError or PsiKvError when the model's process has ended."""
        if not self._ended:
            return
        status = self._worker.wait()
        if status == -signal.SIGKILL and self.sandbox is not None and self.sandbox.group.oom_kills():
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

    # -- the neighbour ----------------------------------------------------------------------------------

    def bring(self, neighbour: Neighbour) -> None:
        """Start a process that takes memory, in the same sandbox."""
        self.said = []
        self._neighbour = self._children.start(neighbour.argv())

    def said_at(self, event: str) -> NeighbourSaid | None:
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
            self.said += [_OF_NEIGHBOUR.decode(line) for line in self._children.end(self._neighbour)]
            self._neighbour = None

    def _hear_neighbour(self, child: Child, line: bytes | None) -> None:
        if line is not None:
            self.said.append(_OF_NEIGHBOUR.decode(line))
        elif not self.said:
            raise PsiKvError(f"the neighbour did not start: {child.complaint()}")


def _checked(message: messages.Message) -> messages.Message:
    if isinstance(message, messages.Failed):
        raise (BadInputError if message.exit_status == BadInputError.exit_status else PsiKvError)(message.why)
    return message


def _watching(setup: Setup, sandbox: Sandbox | None) -> Setup:
    """`setup` with the pressure file of where it runs, if it says none."""
    file = (None if sandbox is None else sandbox.pressure_file) or MACHINE_PRESSURE
    return msgspec.structs.replace(setup, pressure_file=setup.pressure_file or str(file))


def _outside(argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv, **options)
