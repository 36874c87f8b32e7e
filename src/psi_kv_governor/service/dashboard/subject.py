"""What a dashboard is about: a governor of this process, or of another one through its status socket."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec

from psi_kv_governor.commands import Answer, Command, answered
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.events import Event
from psi_kv_governor.governor import Governor
from psi_kv_governor.service.dashboard.view import View, view_of
from psi_kv_governor.status_messages import Hello, Update

KEPT_EVENTS = 200
"""An evening's; a page that is opened later is sent them too."""


class Subject(Protocol):
    """Who is looked at. Calls come from any thread."""

    def view(self, seen: int) -> tuple[View, int]:
        """How it stands, with the events after the first `seen`, and how many there were until now. Raises
        PsiKvError where it is gone."""

    def ask(self, command: Command) -> Answer:
        """Have a command carried out; why it was not stands in the answer."""

    def close(self) -> None:
        """Look no longer. Safe to call twice."""


class _Events:
    """The last events, and how many there were."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=KEPT_EVENTS)
        self._told = 0
        self._lock = threading.Lock()

    def take(self, event: Event) -> None:
        with self._lock:
            self._events.append(event)
            self._told += 1

    def after(self, seen: int) -> tuple[list[Event], int]:
        with self._lock:
            new = min(self._told - seen, len(self._events))
            return list(self._events)[len(self._events) - new :] if new > 0 else [], self._told


class Governed:
    """A governor of this process."""

    def __init__(self, governor: Governor) -> None:
        self._governor = governor
        self._events = _Events()
        self._unsubscribe = governor.subscribe(self._events.take)

    def view(self, seen: int) -> tuple[View, int]:
        events, told = self._events.after(seen)
        return view_of(time.monotonic(), self._governor.status(), events), told

    def ask(self, command: Command) -> Answer:
        return answered(self._governor, msgspec.json.encode(command))

    def close(self) -> None:
        self._unsubscribe()


class Watched:
    """A governor of another process, as its status socket tells it. `messages` are read in a thread, and
    `ask` has a command carried out."""

    def __init__(self, messages: Iterator[Hello | Update | Answer], ask: Callable[[Command], Answer]) -> None:
        """Raises PsiKvError where it says nothing."""
        self._messages, self._ask = messages, ask
        self._events = _Events()
        self._last: Update | None = None
        self._why_gone = ""
        self._first = threading.Event()
        self._closed = False
        threading.Thread(target=self._read, name="psi-kv-watched", daemon=True).start()
        self._first.wait()
        if self._last is None:
            raise PsiKvError(self._why_gone)

    def view(self, seen: int) -> tuple[View, int]:
        if self._why_gone or self._last is None:
            raise PsiKvError(self._why_gone)
        events, told = self._events.after(seen)
        return view_of(self._last.time_s, self._last.status, events), told

    def ask(self, command: Command) -> Answer:
        try:
            return self._ask(command)
        except PsiKvError as error:
            return Answer(error=str(error))

    def close(self) -> None:
        self._closed = True

    def _read(self) -> None:
        try:
            for message in self._messages:
                if self._closed:
                    return
                if isinstance(message, Update):
                    for event in message.events:
                        self._events.take(event)
                    self._last = message
                    self._first.set()
            self._why_gone = "the process has ended, or closed its model"
        except PsiKvError as error:
            self._why_gone = str(error)
        finally:
            self._why_gone = self._why_gone or "it is no longer looked at"
            self._first.set()
