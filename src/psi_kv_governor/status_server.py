"""The thread of a status socket: who is connected, what each is sent, and the commands that come.

While nobody is connected it sleeps in `select`, and an event costs an append.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from psi_kv_governor import socket_place
from psi_kv_governor.commands import Answer, Led, answered
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.events import Event
from psi_kv_governor.forks import at_fork
from psi_kv_governor.status import Status
from psi_kv_governor.status_messages import VERSION, Hello, Update

_log = logging.getLogger("psi_kv_governor")

UPDATE_S = 0.2
"""A person sees five changes a second; to make and send one takes 40 us."""

KEPT_EVENTS = 32
"""The last events; a new client is sent them as well."""

MOST_CLIENTS = 8

MOST_COMMAND_BYTES = 1 << 12
"""Who sends a longer line, or more before it was answered, is let go."""

STUCK_S = 10.0
"""A client that reads nothing for so long is let go. Until then it misses updates, and no events."""


class Seen(Led, Protocol):
    """What the socket asks of a governor."""

    name: str
    config: GovernorConfig

    def status(self) -> Status: ...

    def subscribe(self, subscriber: Callable[[Event], None]) -> Callable[[], None]: ...


class _Client:
    """One who looks."""

    def __init__(self, connection: socket.socket, now_s: float) -> None:
        self.connection = connection
        self.waiting = b""
        """The rest of a line that the kernel's buffer had no room for, and answers; no update is sent before
        them."""
        self.heard = b""
        """What it sent and was not answered yet."""
        self.asks = False
        """A command of it is being carried out."""
        self.read_s = now_s
        """When it last took all there was."""
        self.events_seen = 0


class Server:
    """The thread, and all that it knows. Neither the governor nor its StatusSocket is held by it."""

    def __init__(self, listener: socket.socket, path: Path, governor: weakref.ref[Seen]) -> None:
        self.path = path
        self._listener = listener
        self._governor = governor
        self._pid = os.getpid()
        self._events: deque[Event] = deque(maxlen=KEPT_EVENTS)
        self._told = 0
        """Events so far."""
        self._lock = threading.Lock()  # for both
        self._clients: dict[socket.socket, _Client] = {}
        self._answers: deque[tuple[_Client, Answer]] = deque()
        """Of the threads that carry out commands."""
        self._selector = selectors.DefaultSelector()
        self._woken, self._waking = socket.socketpair()
        self._waking.setblocking(False)
        self._ended = False
        self._encoder = msgspec.json.Encoder()
        self._thread = threading.Thread(target=self._run, name="psi-kv-status", daemon=True)
        _servers.add(self)

    def take(self, event: Event) -> None:
        """Keep an event. This is the governor's thread: it only appends."""
        with self._lock:
            self._events.append(event)
            self._told += 1

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Have the thread end; the path is gone when this returns. In a forked child the parent's stays."""
        self._ended = True
        if os.getpid() != self._pid:
            return
        with contextlib.suppress(OSError):
            self.path.unlink()
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # closed already, or woken often enough
            self._waking.send(b"\0")

    def join(self) -> None:
        """Until it has ended."""
        if self._thread is not threading.current_thread() and os.getpid() == self._pid:
            self._thread.join()

    def abandon(self) -> None:
        """In a forked child: let go of the parent's connections, or they would outlive the parent."""
        self._lock = threading.Lock()  # the parent's thread may have held it
        self._hang_up()

    # -- the thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            _log.warning("the status socket failed and is closed: %s", error)
            _log.debug("how it failed", exc_info=True)
        finally:
            self._hang_up()

    def _hang_up(self) -> None:
        for connection in (*self._clients, self._listener, self._woken, self._waking):
            connection.close()
        self._selector.close()

    def _serve(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        due_s = 0.0
        while True:
            left_s = max(0.0, due_s - time.monotonic()) if self._clients else None
            ready = self._selector.select(left_s)
            if self._ended:
                return
            for key, mask in ready:
                if key.fileobj is self._listener:
                    self._welcome()
                elif key.fileobj is self._woken:
                    self._woken.recv(64)
                    self._answer()
                elif (client := self._clients.get(key.fileobj)) is not None:  # type: ignore[call-overload]
                    self._hear(client) if mask & selectors.EVENT_READ else self._send(client)
            now_s = time.monotonic()
            if self._clients and now_s >= due_s:
                due_s = now_s + UPDATE_S
                if not self._update(now_s):
                    return

    def _welcome(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # gone again, or no descriptor left
            return
        governor = self._governor()
        if governor is None or len(self._clients) >= MOST_CLIENTS or not socket_place.same_user(connection):
            connection.close()
            return
        connection.setblocking(False)
        client = _Client(connection, time.monotonic())
        self._clients[connection] = client
        self._selector.register(connection, selectors.EVENT_READ)
        with self._lock:
            client.events_seen = self._told - len(self._events)
        hello = Hello(
            psi_kv_status=VERSION,
            pid=self._pid,
            name=governor.name,
            config=msgspec.to_builtins(governor.config),
        )
        client.waiting = self._encoder.encode(hello) + b"\n"
        self._send(client)

    def _hear(self, client: _Client) -> None:
        """A command, or the end of the connection."""
        try:
            data = client.connection.recv(MOST_COMMAND_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        client.heard += data
        if not data or len(client.heard) > MOST_COMMAND_BYTES:
            self._dismiss(client)
        else:
            self._ask(client)

    def _ask(self, client: _Client) -> None:
        """Have the next command of this client carried out, in a thread of its own: to park takes a while,
        and the others are to see it happen."""
        line, end, rest = client.heard.partition(b"\n")
        if client.asks or not end:
            return
        client.asks, client.heard = True, rest
        work = threading.Thread(
            target=self._carry_out, args=(client, line), name="psi-kv-command", daemon=True
        )
        work.start()

    def _carry_out(self, client: _Client, line: bytes) -> None:
        governor = self._governor()
        gone = Answer(error="the model is being closed")
        self._answers.append((client, gone if governor is None else answered(governor, line)))
        self._wake()

    def _answer(self) -> None:
        while self._answers:
            client, answer = self._answers.popleft()
            if client.connection in self._clients:
                client.asks = False
                client.waiting += self._encoder.encode(answer) + b"\n"
                self._send(client)
            if client.connection in self._clients:
                self._ask(client)

    def _update(self, now_s: float) -> bool:
        """Send everybody who keeps up how things stand. False when the governor is gone."""
        governor = self._governor()
        if governor is None:
            return False
        with self._lock:  # before the status, which shows what they tell of
            events, told = list(self._events), self._told
        status = governor.status()
        for client in list(self._clients.values()):
            if client.waiting:
                if now_s - client.read_s > STUCK_S:
                    self._dismiss(client)
                continue
            new = min(told - client.events_seen, len(events))
            update = Update(time_s=now_s, status=status, events=events[len(events) - new :])
            client.events_seen = told
            client.waiting = self._encoder.encode(update) + b"\n"
            self._send(client)
        return True

    def _send(self, client: _Client) -> None:
        """Send what fits; the rest waits until there is room for it."""
        try:
            sent = client.connection.send(client.waiting)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._dismiss(client)
            return
        client.waiting = client.waiting[sent:]
        wanted = selectors.EVENT_READ
        if client.waiting:
            wanted |= selectors.EVENT_WRITE
        else:
            client.read_s = time.monotonic()
        self._selector.modify(client.connection, wanted)

    def _dismiss(self, client: _Client) -> None:
        self._selector.unregister(client.connection)
        del self._clients[client.connection]
        client.connection.close()


_servers: weakref.WeakSet[Server] = weakref.WeakSet()


def _after_fork() -> None:
    for server in list(_servers):
        server.abandon()


at_fork(in_child=_after_fork)
