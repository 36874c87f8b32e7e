"""Starting the model's process so that its context is whole, and making it whole again after a trial."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from psi_kv_governor.bench.messages import Variant
from psi_kv_governor.bench.pen import Swap
from psi_kv_governor.bench.record import Say
from psi_kv_governor.bench.trials import messages
from psi_kv_governor.bench.trials.host import Host, ModelKilledError, Setup, SilentError
from psi_kv_governor.bench.trials.oom_plan import NAMES
from psi_kv_governor.bench.trials.sizing import Need, Sizes, until_opened
from psi_kv_governor.errors import PsiKvError

STARTS = 5
"""Attempts to begin whole: while a model opens, its own growth can look like pressure to its governor."""
_ANSWER_S = 300.0
"""A chunk of a prompt takes seconds, and ten times as long when weights have to be read again."""
_S = TypeVar("_S", bound="Serving")


class Starter:
    """Starts the process of one setup in pens of one size."""

    def __init__(self, setup: Setup, need: Need, sizes: Sizes, swap: Swap, swap_bytes: int) -> None:
        self._setup, self._need, self._sizes = setup, need, sizes
        self._swap: Swap = swap
        self._swap_bytes = swap_bytes

    def start(self, variant: Variant, say: Say, fit: Callable[[Host], bool] = lambda host: True) -> Host:
        """A process whose context is whole, bit for bit, and that is `fit` for what comes.

        Raises PsiKvError where none can be had: because the model alone does not fit, or is not left whole.
        """
        why = ""
        for number in range(STARTS):
            say(f"starting the {NAMES[variant]} model" + (f" again: {why}" if number else ""))
            host = self._opened(variant, say)
            why = self.make_whole(host)
            if not why and fit(host):
                return host
            why = why or "it has given up too much at its start"
            host.close()
        raise PsiKvError(
            f"the {NAMES[variant]} model is not left whole in {self._sizes.limit_bytes >> 20} MiB with no "
            f"neighbour beside it ({why}): give a higher --limit-mib"
        )

    def make_whole(self, host: Host) -> str:
        """Stop what it does and have everything put back. Gives why it is not whole; empty when it is."""
        try:
            host.say("stop")
            host.until(messages.Stopped, _ANSWER_S)
            host.say("whole")
            whole, _ = host.until(messages.Whole, _ANSWER_S)
        except (ModelKilledError, SilentError) as error:
            return str(error)
        if whole.missing_cells:
            return f"{whole.missing_cells} cells are away"
        return "" if whole.digest == self._need.digest else "cells were computed again, and differ"

    def _opened(self, variant: Variant, say: Say) -> Host:
        host = Host(
            self._setup.argv(variant),
            Path(self._setup.model),
            self._sizes.limit_bytes,
            self._swap,
            self._swap_bytes,
        )
        try:
            until_opened(host, say)
        except ModelKilledError:
            host.close()
            raise PsiKvError(
                f"the model alone does not fit into {self._sizes.limit_bytes >> 20} MiB: give a higher "
                "--limit-mib or a smaller --ctx"
            ) from None
        except BaseException:
            host.close()
            raise
        return host


class Serving:
    """One model's process for trial after trial, started anew where it is no longer good for the next one.

    A context manager: what still runs ends with it.
    """

    def __init__(self, starter: Starter, say: Say) -> None:
        self._starter, self._say = starter, say
        self._host: Host | None = None
        self._variant: Variant | None = None

    def __enter__(self: _S) -> _S:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _ready(self, variant: Variant, fit: Callable[[Host], bool] = lambda host: True) -> tuple[Host, bool]:
        """A process of `variant` that is whole and `fit`, and whether it is a new one. Raises PsiKvError."""
        if self._host is not None and self._variant == variant and fit(self._host):
            return self._host, False
        self._end()
        self._host, self._variant = self._starter.start(variant, self._say, fit), variant
        return self._host, True

    def _give_up(self, host: Host) -> bool:
        """End a process that is not whole. Gives whether the kernel killed it; raises PsiKvError where it
        ended otherwise."""
        try:
            return host.model_killed()
        finally:
            self._end()

    def _end(self) -> None:
        if self._host is not None:
            host, self._host = self._host, None
            host.close()
