"""The model's process, in a sandbox or outside of one, and at times a neighbour of any kind beside it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Concatenate, ParamSpec, TypeVar

import msgspec

from psi_kv_governor.children import python_command
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.sandbox.children import Child
from psi_kv_governor.sandbox.load import MIB
from psi_kv_governor.sandbox.sandbox import Sandbox, drop_file_cache
from psi_kv_governor.sandbox.scene import ModelKilledError, check_alive
from psikv_bench import load, messages
from psikv_bench.load import LoadKind
from psikv_bench.messages import Setup
from psikv_bench.watch import MACHINE_PRESSURE
from psikv_bench.worker import Worker

__all__ = ["MIB", "Host", "ModelKilledError", "SilentError", "neighbour"]

_POLL_S = 0.1
_P = ParamSpec("_P")
_M = TypeVar("_M", bound=messages.Message)
_OF_MODEL = msgspec.json.Decoder(messages.Said)
_OF_NEIGHBOUR = msgspec.json.Decoder(messages.NeighbourSaid)


def neighbour(kind: LoadKind, n_bytes: int, **options: float | str) -> list[str]:
    """The command of a process that takes memory; `options` are those of its command line (`load`)."""
    argv = python_command(load.__name__, "--kind", kind, "--mib", str(max(1, n_bytes // MIB)))
    for name, value in options.items():
        argv += [f"--{name.replace('_', '-')}", str(value)]
    return argv


class SilentError(PsiKvError):
    """The model's process did not say in time what it was waited for."""


class Host:
    """A context manager. Everything in it is gone when it is left, or when this process is killed.

    Without a limit there is no sandbox. Raises PsiKvError where none can be made.
    """

    def __init__(self, setup: Setup, limit_bytes: int | None = None, swap_bytes: int = 0) -> None:
        self.sandbox: Sandbox | None = None
        self._neighbour: Child | None = None
        self._said: list[messages.NeighbourSaid] = []
        self._again: list[Any] = []
        with ExitStack() as stack:
            if limit_bytes is not None:
                drop_file_cache(setup.model)  # so that the weights are read, and charged, in it
                self.sandbox = stack.enter_context(Sandbox(limit_bytes, swap_bytes=swap_bytes))
            self.model = stack.enter_context(self._started(self.command(setup), _OF_MODEL.decode))
            self.pid = self.model.pid
            stack.callback(self.end_neighbour)
            self._stack = stack.pop_all()

    def command(self, setup: Setup) -> list[str]:
        """How the model's process is started: the reference polls the pressure of where that is."""
        file = (None if self.sandbox is None else self.sandbox.pressure_file) or MACHINE_PRESSURE
        setup = msgspec.structs.replace(setup, pressure_file=str(file))
        return python_command(Worker.__module__, msgspec.json.encode(setup).decode())

    def _started(self, argv: Sequence[str], decode: Callable[[bytes], Any]) -> Child:
        return Child(argv, subprocess.Popen if self.sandbox is None else self.sandbox.popen, decode)

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what runs in it, and remove the sandbox. Safe to call twice."""
        self._stack.close()

    # -- the model --------------------------------------------------------------------------------------

    def order(
        self, what: Callable[Concatenate[Worker, _P], Any], *unnamed: _P.args, **given: _P.kwargs
    ) -> None:
        """Have the model's process do `what`, a method of its Worker."""
        assert not unnamed, "they are given by their names"
        self.model.send(msgspec.json.encode((what.__name__, given)))

    def hear(self, timeout_s: float) -> list[Any]:
        """What the model says within `timeout_s`; less when something comes. Empty once it has ended."""
        found, self._again = self._again, []
        return found or self.model.hear(timeout_s)

    def hear_again(self, heard: Sequence[Any]) -> None:
        """Give back what was heard last and nobody looked at: the next `hear` begins with it."""
        self._again[:0] = heard

    def check_alive(self) -> None:
        """Raises ModelKilledError, BadInputError or PsiKvError when the model's process has ended."""
        check_alive(self.model, self.sandbox)

    def until(
        self,
        kind: type[_M],
        timeout_s: float,
        on_other: Callable[[messages.Message], None] = lambda message: None,
    ) -> _M:
        """Wait for a message of `kind`; `on_other` hears what is said before it.

        What is said after it waits for the next one who listens.

        Raises ModelKilledError, SilentError after `timeout_s`, or PsiKvError when the process ends otherwise.
        """
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            heard = self.hear(_POLL_S)
            for place, message in enumerate(heard):
                if isinstance(message, kind):
                    self.hear_again(heard[place + 1 :])
                    return message
                on_other(message)
            self.check_alive()
        raise SilentError(f"the model's process said nothing of {kind.__name__} in {timeout_s:.0f} s")

    def model_killed(self) -> bool:
        """Whether the kernel killed the model. Raises PsiKvError when its process ended otherwise."""
        try:
            self.check_alive()
        except ModelKilledError:
            return True
        return False

    # -- the neighbour ----------------------------------------------------------------------------------

    def bring(self, argv: Sequence[str]) -> None:
        """Start a process that takes memory, in the same sandbox."""
        self._said, self._neighbour = [], self._started(argv, _OF_NEIGHBOUR.decode)

    @property
    def said(self) -> list[messages.NeighbourSaid]:
        """What the neighbour of now, or the last one, said. Raises PsiKvError where it could not begin."""
        if self._neighbour is not None:
            self._said += self._neighbour.hear(0.0)
            if self._neighbour.ended and not self._said:
                raise PsiKvError(f"the neighbour did not start: {self._neighbour.complaint()}")
        return self._said

    def neighbour_killed(self) -> bool:
        """Whether the kernel killed the neighbour. Raises PsiKvError when it ended otherwise."""
        return self._neighbour is not None and self._neighbour.killed("the neighbour")

    def end_neighbour(self) -> None:
        """Its memory is free when this returns. Safe to call without one."""
        if self._neighbour is not None:
            self._neighbour.end()
            self._said += self._neighbour.hear(0.0)
            self._neighbour = None

    def said_at(self, event: str) -> messages.NeighbourSaid | None:
        """The first line of the neighbour with this `event`."""
        return next((line for line in self.said if line.event == event), None)
