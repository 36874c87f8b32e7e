"""How a governed process is looked at and led from outside: a Unix socket that only its owner can open.

Whoever connects is sent JSON lines: one Hello, then an Update five times a second. Who sends a command, a
JSON line too (`psi_kv_governor.commands`), is sent an Answer among them.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable
from pathlib import Path

from psi_kv_governor import socket_place
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.status_server import Seen, Server

_log = logging.getLogger("psi_kv_governor")


class StatusSocket:
    """Lets the owner's other processes look at `governor` and lead it, from `start` to `close`.

    It holds the governor weakly and goes with it. `start` never raises: where no socket can be had,
    `problem` says why, and the governor works without.
    """

    def __init__(self, governor: Seen) -> None:
        self.problem = ""
        self._governor = weakref.ref(governor)
        self._server: Server | None = None
        self._unsubscribe: Callable[[], None] | None = None

    @property
    def path(self) -> Path | None:
        """Where it is; None while there is none."""
        return None if self._server is None else self._server.path

    def start(self) -> None:
        """Open it. Calling it again changes nothing."""
        governor = self._governor()
        if self._server is not None or governor is None:
            return
        if not socket_place.able():
            self.problem = "no status socket: this platform has no Unix sockets"
            return
        try:
            listener, path = socket_place.listen()
        except PsiKvError as error:
            self.problem = str(error)
            _log.info(self.problem)
            return
        try:
            server = Server(listener, path, self._governor)
            server.start()
        except (OSError, RuntimeError) as error:  # no descriptor or no thread is to be had
            listener.close()
            with contextlib.suppress(OSError):
                path.unlink()
            self.problem = f"no status socket: {error}"
            _log.info(self.problem)
            return
        self._server = server
        self._unsubscribe = governor.subscribe(self._server.take)
        weakref.finalize(self, self._server.end)  # also when the governor is only dropped

    def close(self) -> None:
        """Remove it, and send everybody away. Safe to call twice, and in a forked child."""
        if self._unsubscribe is not None:
            self._unsubscribe()
        if self._server is not None:
            self._server.end()
            self._server.join()
            self._server = None
