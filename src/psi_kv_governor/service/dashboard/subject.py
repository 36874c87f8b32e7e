"""What a dashboard is about: a governor of this process, or of another one through its status socket."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Protocol

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.events import Event
from psi_kv_governor.governor import Governor
from psi_kv_governor.service.dashboard.view import View, view_of
from psi_kv_governor.status_socket import Hello, Update

KEPT_EVENTS = 200
"""An evening's; a page that is opened later is sent them too."""


class Subject(Protocol):
    """Who is looked at. Calls come from any thread."""

    @property
    def why_no_commands(self) -> str:
        """Why nothing can be asked of it; empty where it can."""

    def view(self, seen: int) -> tuple[View, int]:
        """How it stands, with the events after the first `seen`, and how many there were until now. Raises
        PsiKvError where it is gone."""

    def command(self, verb: str, share: float | None) -> str:
        """`park`, `unpark`, or `limit` with a share from 0 to 1 (None lifts it); gives what came of it.

        Raises PsiKvError.
        """

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

    why_no_commands = ""

    def __init__(self, governor: Governor) -> None:
        self._governor = governor
        self._events = _Events()
        self._unsubscribe = governor.subscribe(self._events.take)

    def view(self, seen: int) -> tuple[View, int]:
        events, told = self._events.after(seen)
        return view_of(time.monotonic(), self._governor.status(), events), told

    def command(self, verb: str, share: float | None) -> str:
        if verb == "limit":
            self._governor.limit(share)
            return (
                "the limit is lifted"
                if share is None
                else f"under pressure a cache holds {share:.0%} of its cells"
            )
        result = self._governor.park() if verb == "park" else self._governor.unpark()
        n_bytes = result.bytes_returned if verb == "park" else result.bytes_back
        said = f"{n_bytes / 2**20:,.0f} MiB {'returned' if verb == 'park' else 'are back'}"
        return f"{said}: {result.problem}" if result.problem else said

    def close(self) -> None:
        self._unsubscribe()


class Watched:
    """A governor of another process, as its status socket tells it. `messages` are read in a thread."""

    why_no_commands = "from here it can only be looked at: start it with psi-kv exec --dashboard PORT"

    def __init__(self, messages: Iterator[Hello | Update]) -> None:
        """Raises PsiKvError where it says nothing."""
        self._messages = messages
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

    def command(self, verb: str, share: float | None) -> str:
        del verb, share
        raise PsiKvError(self.why_no_commands)

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
