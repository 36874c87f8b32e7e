"""The model's process, in a sandbox or outside of one, and at times a neighbour beside it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import msgspec

from psi_kv_governor.children import python_command
from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.sandbox import messages, worker
from psi_kv_governor.sandbox.children import Child, Heard
from psi_kv_governor.sandbox.messages import Setup
from psi_kv_governor.sandbox.sandbox import Sandbox

MIB = 1 << 20

_H = TypeVar("_H", bound="Host")


class ModelKilledError(PsiKvError):
    """The kernel killed the model's process for want of memory."""


class Host:
    """A context manager. Everything in it is gone when it is left, or when this process is killed.

    Without a limit there is no sandbox. Raises PsiKvError where none can be made.
    """

    of_model: msgspec.json.Decoder[Any] = msgspec.json.Decoder(messages.Said)
    of_neighbour: msgspec.json.Decoder[Any] = msgspec.json.Decoder(messages.NeighbourSaid)

    def __init__(self, setup: Setup, limit_bytes: int | None = None, swap_bytes: int = 0) -> None:
        self._stack = ExitStack()
        self._heard: Heard = SimpleQueue()
        self._messages: list[messages.Message] = []
        self._ended = False
        self._neighbour: Child | None = None
        self.said: list[Any] = []
        """What the neighbour of now, or the last one, said."""
        self.sandbox: Sandbox | None = None
        with self._stack:
            if limit_bytes is not None:
                drop_file_cache(setup.model)  # so that the weights are read, and charged, in it
                self.sandbox = self._stack.enter_context(Sandbox(limit_bytes, swap_bytes=swap_bytes))
            self._worker = self._start(self.command(setup))
            self._stack = self._stack.pop_all()

    def command(self, setup: Setup) -> list[str]:
        """How the model's process is started."""
        return python_command(worker.__name__, msgspec.json.encode(setup).decode())

    def _start(self, argv: Sequence[str]) -> Child:
        launch = subprocess.Popen if self.sandbox is None else self.sandbox.popen
        return self._stack.enter_context(Child(argv, launch, self._heard))

    def __enter__(self: _H) -> _H:
        return self

    def __exit__(self, *_: object) -> None:
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

    def hear(self, timeout_s: float) -> list[Any]:
        """What the model says within `timeout_s`; less when something comes. Empty once it has ended.

        Raises PsiKvError where the neighbour could not begin.
        """
        with suppress(Empty):
            if not self._messages:
                self._take_in(*self._heard.get(timeout=max(0.0, timeout_s)))
            while True:
                self._take_in(*self._heard.get_nowait())
        found, self._messages = self._messages, []
        return found

    def hear_again(self, heard: Sequence[Any]) -> None:
        """Give back what was heard last and nobody looked at: the next `hear` begins with it."""
        self._messages[:0] = heard

    def _take_in(self, child: Child, line: bytes | None) -> None:
        if child is self._worker:
            if line is None:
                self._ended = True
            else:
                self._messages.append(self.of_model.decode(line))
        elif child is self._neighbour:
            if line is not None:
                self.said.append(self.of_neighbour.decode(line))
            elif not self.said:
                raise PsiKvError(f"the neighbour did not start: {child.complaint()}")

    def check_alive(self) -> None:
        """Raises ModelKilledError, BadInputError or PsiKvError when the model's process has ended."""
        if not self._ended:
            return
        status = self._worker.wait()
        if status == -signal.SIGKILL and self.sandbox is not None and self.sandbox.group.oom_kills():
            raise ModelKilledError("the kernel killed the model's process for want of memory")
        complaint = self._worker.complaint() or "it said nothing"
        if status == BadInputError.exit_status:
            raise BadInputError(complaint)
        raise PsiKvError(f"the model's process ended with status {status}: {complaint}")

    # -- the neighbour ----------------------------------------------------------------------------------

    def bring(self, argv: Sequence[str]) -> None:
        """Start a process that takes memory, in the same sandbox."""
        self.said = []
        self._neighbour = self._start(argv)

    def neighbour_killed(self) -> bool:
        """Whether the kernel killed the neighbour. Raises PsiKvError when it ended otherwise."""
        if self._neighbour is None or (status := self._neighbour.status()) is None:
            return False
        if status != -signal.SIGKILL:
            raise PsiKvError(f"the neighbour ended with status {status}: {self._neighbour.complaint()}")
        return True

    def end_neighbour(self) -> None:
        """Its memory is free when this returns. Safe to call without one."""
        if self._neighbour is None:
            return
        self._neighbour.end()
        self.hear_again(self.hear(0.0))
        self._neighbour = None


def drop_file_cache(path: str | Path) -> None:
    """Forget the file's pages, so that they are read, and charged, by whoever needs them next (page cache
    belongs to the cgroup that touches it first). Pages that another process has mapped stay where they are,
    and so do dirty ones."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
