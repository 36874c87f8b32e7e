"""Safe points: the cache changes only while no decode is running (invariant 3)."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from psi_kv_governor.forks import at_fork


class SafePoint:
    """A re-entrant lock on the context that lets the governor in first.

    A plain lock is not fair: a thread that decodes token after token takes it again before a waiting
    governor wakes. Here a decode waits as long as somebody urgent does.

    What a decode holds is the bare lock of the C library, because Python lets no Ctrl-C come between taking
    or leaving it and the block of its `with`. Around a lock in Python one in 200 did, with decodes of 0.2 ms:
    the lock stayed taken, and closing the model waited for ever.
    """

    def __init__(self, interrupt: Callable[[bool], None] = lambda wanted: None) -> None:
        """`interrupt` is told True when somebody urgent can't wait any longer, and False when he is in."""
        self._interrupt = interrupt
        self._begin()
        _points.add(self)

    def _begin(self) -> None:
        """Nobody has it. Also in a forked child, where whoever had it may not have come along."""
        self._lock = threading.RLock()
        self._nobody_urgent = threading.Event()
        self._nobody_urgent.set()
        self._counting = threading.Lock()
        self._urgent_waiting = 0

    @property
    def mine(self) -> bool:
        """Whether this thread has it."""
        return bool(self._lock._is_owned())  # type: ignore[attr-defined]

    def hold(self, *, urgent: bool = False, patience_s: float = math.inf) -> AbstractContextManager[Any]:
        """A context manager: have the context to oneself. `urgent` goes before everybody who is not, and
        has the decode interrupted that still runs after `patience_s`.

        It is entered at once: who is not urgent gives way in this call. Calls may be nested in one thread.
        """
        if urgent:
            return _Urgent(self, patience_s)
        if not self._nobody_urgent.is_set() and not self.mine:
            self._nobody_urgent.wait()
        return self._lock

    def enter_urgently(self, patience_s: float = math.inf, timeout_s: float = math.inf) -> bool:
        """Take the lock before everybody who is not urgent; False if it was not to be had in `timeout_s`."""
        with self._counting:
            self._urgent_waiting += 1
            self._nobody_urgent.clear()
        try:
            first_s = min(patience_s, timeout_s)
            if self._lock.acquire(timeout=-1 if first_s == math.inf else first_s):
                return True
            if timeout_s <= patience_s:
                return False
            self._interrupt(True)
            try:
                return self._lock.acquire()
            finally:
                self._interrupt(False)
        finally:
            with self._counting:
                self._urgent_waiting -= 1
                if self._urgent_waiting == 0:
                    self._nobody_urgent.set()

    def leave(self) -> None:
        """Give it back, once for each time it was taken."""
        self._lock.release()


class _Urgent:
    def __init__(self, point: SafePoint, patience_s: float) -> None:
        self._point = point
        self._patience_s = patience_s

    def __enter__(self) -> None:
        self._point.enter_urgently(self._patience_s)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._point.leave()


_points: weakref.WeakSet[SafePoint] = weakref.WeakSet()
_held: list[SafePoint] = []
_FORK_PATIENCE_S = 0.1


def _before_fork() -> None:
    """Fork at a safe point: in the middle of a decode the child's cache would be neither old nor new."""
    for point in list(_points):
        point.enter_urgently(_FORK_PATIENCE_S)
        _held.append(point)


def _after_fork() -> None:
    while _held:
        _held.pop().leave()


def _after_fork_in_child() -> None:
    _after_fork()
    for point in list(_points):
        if not point.mine:
            point._begin()


at_fork(before=_before_fork, in_parent=_after_fork, in_child=_after_fork_in_child)
