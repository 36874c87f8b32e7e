"""The model's process with the orders of the benchmarks, and neighbours of every kind beside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from psi_kv_governor.children import python_command
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.sandbox import host
from psi_kv_governor.sandbox.host import MIB, ModelKilledError
from psikv_bench import load, messages, worker
from psikv_bench.load import LoadKind
from psikv_bench.watch import MACHINE_PRESSURE

__all__ = ["MIB", "Host", "ModelKilledError", "SilentError", "neighbour"]

_POLL_S = 0.1
_M = TypeVar("_M", bound=messages.Message)


def neighbour(kind: LoadKind, n_bytes: int, **options: float | str) -> list[str]:
    """The command of a process that takes memory; `options` are those of its command line (`load`)."""
    argv = python_command(load.__name__, "--kind", kind, "--mib", str(max(1, n_bytes // MIB)))
    for name, value in options.items():
        argv += [f"--{name.replace('_', '-')}", str(value)]
    return argv


class SilentError(PsiKvError):
    """The model's process did not say in time what it was waited for."""


class Host(host.Host):
    """A context manager: see there."""

    of_model = msgspec.json.Decoder(messages.Said)
    of_neighbour = msgspec.json.Decoder(messages.NeighbourSaid)

    def command(self, setup: Any) -> list[str]:
        """How the model's process is started: the reference polls the pressure of where that is."""
        file = (None if self.sandbox is None else self.sandbox.pressure_file) or MACHINE_PRESSURE
        setup = msgspec.structs.replace(setup, pressure_file=str(file))
        return python_command(worker.__name__, msgspec.json.encode(setup).decode())

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

    def done(self, order: messages.Order, timeout_s: float) -> messages.Done:
        """Have an order carried out."""
        self.order(order)
        return self.until(messages.Done, timeout_s)

    def model_killed(self) -> bool:
        """Whether the kernel killed the model. Raises PsiKvError when its process ended otherwise."""
        try:
            self.check_alive()
        except ModelKilledError:
            return True
        return False

    def said_at(self, event: str) -> messages.NeighbourSaid | None:
        """The first line of the neighbour with this `event`."""
        return next((line for line in self.said if line.event == event), None)
