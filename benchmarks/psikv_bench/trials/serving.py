"""One model's process for trial after trial, with a neighbour that comes and goes."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.events import Released, Trimmed
from psi_kv_governor.sandbox.sandbox import Swap
from psikv_bench import messages
from psikv_bench.host import MIB, Host, ModelKilledError, SilentError, neighbour
from psikv_bench.messages import Setup, Variant
from psikv_bench.record import Say
from psikv_bench.trials.sizing import SWAP_BYTES, Need, Sizes, until_opened
from psikv_bench.watch import Watcher
from psikv_bench.worker import Worker

MB = 1_000_000

STARTS = 5
"""Attempts to begin whole: while a model opens, its own growth can look like pressure to its governor."""
_ANSWER_S = 300.0
"""A chunk of a prompt takes seconds, and ten times as long when weights have to be read again."""
_HEAR_S = 0.02
_TRAIL = 40


class Serving:
    """Starts the model's process anew where it is no longer good for the next trial. To be closed.

    `setup` and `need` come from `sizing.prepared`.
    """

    def __init__(self, setup: Setup, need: Need, sizes: Sizes, swap: Swap, say: Say) -> None:
        self._setup, self._need, self._sizes, self._swap, self._say = setup, need, sizes, swap, say
        self._host: Host | None = None
        self._variant: Variant | None = None
        self.given_up: list[tuple[float, int]] = []
        """(time, cells) of each trim since the process began."""

    def ready(self, variant: Variant, fit: Callable[[], bool] = lambda: True) -> Host:
        """A process of `variant` that is whole and `fit`.

        Raises PsiKvError where none can be had: the model alone does not fit, or is not left whole.
        """
        if self._host is not None and self._variant == variant and fit():
            return self._host
        why = ""
        for number in range(STARTS):
            self.close()
            self._say(f"starting the model, {variant}" + (f", again: {why}" if number else ""), new=True)
            self._host, self._variant = self._opened(variant), variant
            why = self.make_whole(self._host)
            if not why and fit():
                return self._host
            why = why or "it has given up too much at its start"
        self.close()
        raise PsiKvError(
            f"the model ({variant}) is not left whole in {self._limit_mib} MiB with no neighbour beside it "
            f"({why}): give a higher --limit-mib"
        )

    @property
    def _limit_mib(self) -> int:
        return self._sizes.limit_bytes // MIB

    def _opened(self, variant: Variant) -> Host:
        setup = msgspec.structs.replace(self._setup, variant=variant)
        with contextlib.ExitStack() as ending:
            host = ending.enter_context(Host(setup, self._sizes.limit_bytes, SWAP_BYTES[self._swap]))
            try:
                until_opened(host, self._say)
            except ModelKilledError:
                raise PsiKvError(
                    f"the model alone does not fit into {self._limit_mib} MiB: give a higher --limit-mib or "
                    "a smaller --ctx"
                ) from None
            ending.pop_all()
        return host

    def make_whole(self, host: Host) -> str:
        """Stop what it does and have everything put back. Gives why it is not whole; empty when it is."""
        try:
            host.order(Worker.stop)
            host.until(messages.Stopped, _ANSWER_S, self.note)
            host.order(Worker.whole)
            whole = host.until(messages.Checked, _ANSWER_S, self.note)
        except (ModelKilledError, SilentError) as error:
            return str(error)
        if whole.missing_cells:
            return f"{whole.missing_cells} cells are away"
        return "" if whole.digest == self._need.digest else "cells were decoded again, and differ"

    def note(self, message: messages.Message) -> None:
        """Count what is given up."""
        if isinstance(message, messages.Governed) and isinstance(message.event, Trimmed):
            self.given_up.append((message.event.time_s, message.event.cells))

    def give_up(self, host: Host) -> bool:
        """End a process that is not whole. Gives whether the kernel killed it; raises PsiKvError where it
        ended otherwise."""
        try:
            return host.model_killed()
        finally:
            self.close()

    def close(self) -> None:
        """End the process, if there is one."""
        self.given_up = []
        if self._host is not None:
            host, self._host = self._host, None
            host.close()


class Onset:
    """A neighbour comes to a model that goes on with something; and all that is said and seen meanwhile.

    Looks are taken while `watcher` is entered.
    """

    def __init__(self, host: Host, serving: Serving, look_s: float) -> None:
        assert host.sandbox is not None, "trials have a limit"
        self.host, self._serving = host, serving
        self.watcher = Watcher(host.sandbox, host.pid, look_s)
        self.tokens: list[messages.Token] = []
        self.events: list[messages.Governed] = []
        self.trail: deque[messages.Turned] = deque(maxlen=_TRAIL)
        """The governor's last turns."""
        self.killed = self.neighbour_killed = False
        self.ended_s = 0.0
        with contextlib.suppress(OSError):  # VmHWM counts from now on (proc_pid_clear_refs(5)), or for life
            Path(f"/proc/{host.pid}/clear_refs").write_text("5")

    def listen(self, seconds: float, is_over: Callable[[], bool] = lambda: False) -> bool:
        """Take in what is said until `is_over`; False where it never was. Raises ModelKilledError."""
        until_s = time.monotonic() + seconds
        while not is_over():
            if (left_s := until_s - time.monotonic()) <= 0:
                return False
            for message in self.host.hear(min(_HEAR_S, left_s)):
                self._take_in(message)
            self.host.check_alive()
        return True

    def press(
        self, n_bytes: int, rate: float, hold_s: float, most_s: float,
        is_over: Callable[[], bool] = lambda: True,
    ) -> bool:  # fmt: skip
        """A neighbour takes `n_bytes` at `rate` MB/s (0: as fast as it can) and holds them for `hold_s` and
        until `is_over`, or one of the two is killed; False where that took `most_s` more than the ramp, from
        its first byte on: the start of its interpreter takes seconds on a busy machine."""
        self.host.bring(neighbour("ramp", n_bytes, rate_mib_s=rate * MB / MIB))

        def ended() -> bool:
            taken = self.host.said_at("taken")
            held = taken is not None and time.monotonic() - taken.time_s >= hold_s
            return self.host.neighbour_killed() or (held and is_over())

        over = True
        try:
            self.listen(_ANSWER_S, lambda: bool(self.host.said))
            over = self.listen((n_bytes / (rate * MB) if rate else 0.0) + most_s, ended)
            if self.host.neighbour_killed():
                self.listen(_HEAR_S)  # the model may have been killed with it
        except ModelKilledError:
            self.killed = True
        self.ended_s = time.monotonic()
        self.neighbour_killed = self.host.neighbour_killed()
        self.host.end_neighbour()
        return over

    @property
    def began_s(self) -> float:
        """The neighbour's first byte."""
        began = self.host.said_at("begin")
        return self.ended_s if began is None else began.time_s

    def back(self) -> list[Trimmed | Released]:
        """What gave bytes back since the neighbour's first byte."""
        if self.host.said_at("begin") is None:
            return []
        events = [message.event for message in self.events]
        given = [event for event in events if isinstance(event, Trimmed | Released) and event.bytes_returned]
        return [event for event in given if event.time_s >= self.began_s]

    def _take_in(self, message: messages.Message) -> None:
        self._serving.note(message)
        if isinstance(message, messages.Token):
            self.tokens.append(message)
        elif isinstance(message, messages.Governed):
            self.events.append(message)
        elif isinstance(message, messages.Turned):
            self.trail.append(message)
