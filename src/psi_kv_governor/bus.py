"""Tells subscribers what happened, and each thing that can't be done once."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from psi_kv_governor.events import Degraded, Event

_log = logging.getLogger("psi_kv_governor")
_T = TypeVar("_T")


def words(error: Exception) -> str:
    """An error of anybody's in one line."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")


class Subscribers(Generic[_T]):
    """Functions that are told of everything of one kind, in the thread where it happens."""

    def __init__(self) -> None:
        self._subscribers: list[Callable[[_T], None]] = []

    def subscribe(self, subscriber: Callable[[_T], None]) -> Callable[[], None]:
        """Call `subscriber` with everything from now on; gives a function to end it."""
        self._subscribers.append(subscriber)
        return lambda: self._subscribers.remove(subscriber) if subscriber in self._subscribers else None

    def __bool__(self) -> bool:
        """Whether anybody is told."""
        return bool(self._subscribers)

    def tell(self, what: _T) -> None:
        """Give `what` to everybody. One who fails is dropped."""
        for subscriber in list(self._subscribers):
            try:
                subscriber(what)
            except Exception:
                # Somebody else's function: it must not stop the loop that keeps the machine alive.
                _log.exception("a subscriber failed on %s and is dropped", type(what).__name__)
                if subscriber in self._subscribers:
                    self._subscribers.remove(subscriber)


class Bus(Subscribers[Event]):
    """The subscribers of one governor's events, and what has been said to them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._said: set[str] = set()

    def degrade(self, what: str, why: str) -> None:
        """A step can't be done here (any more): an event and a line in the log, once for each cause."""
        cause = re.sub(r"\d+", "", f"{what}: {why}")  # the same cause with other figures is the same
        if cause in self._said:
            return
        self._said.add(cause)
        _log.warning("%s: %s", what, why)
        self.tell(Degraded(time_s=self._clock(), what=what, why=why))
