"""Forward passes of one cache, and whoever wants to move its rows between them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from psi_kv_governor.engines.transformers.places import Places
from psi_kv_governor.errors import BadInputError


class Passes:
    """A part of a cache: while a pass runs nothing moves, and who waits gets in between two of them."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held by a forward pass, and by whoever moves rows."""
        self._turn = threading.Lock()
        self._running = self._runner = self._began = 0

    @property
    def places(self) -> Places:
        """Which positions have rows."""
        raise NotImplementedError

    def pass_ended(self) -> None:
        """A pass ended, well or not, and nobody else can move rows yet."""

    def check_update(self) -> None:
        """See Owner."""
        if threading.get_ident() != self._runner:
            raise BadInputError(
                "this GovernedCache belongs to another model, or its model was entered by a side door: make "
                "one for each model, and call the model itself"
            )

    def begin_forward(self) -> None:
        """A forward pass begins: nothing moves until it ends. Called by the hooks."""
        if threading.get_ident() == self._runner:
            self.lock.acquire()
        else:
            with self._turn:  # so that whoever waits to move rows gets in between two tokens
                self.lock.acquire()
        self._runner = threading.get_ident()
        if not self._running:
            self._began = self.places.next_position
        self._running += 1

    def end_forward(self) -> None:
        """It ended, well or not."""
        if self._running:
            self._running -= 1
            self._runner = self._runner if self._running else 0
            if not self._running:
                self.pass_ended()
            self.lock.release()

    @property
    def running(self) -> bool:
        """Whether a forward pass is under way."""
        return self._running > 0

    @contextlib.contextmanager
    def at_rest(self, patience_s: float) -> Iterator[bool]:
        """Hold off forward passes; false where one did not end within `patience_s`."""
        until = time.monotonic() + max(0.0, patience_s)
        held = False
        if self._turn.acquire(timeout=max(0.0, min(patience_s, threading.TIMEOUT_MAX))):
            left = max(0.0, until - time.monotonic())
            held = self.lock.acquire(timeout=min(left, threading.TIMEOUT_MAX))
            self._turn.release()
        try:
            yield held and not self._running
        finally:
            if held:
                self.lock.release()
