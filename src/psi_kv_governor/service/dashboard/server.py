"""Serves the dashboard in a thread of its own."""

from __future__ import annotations

import secrets
import socket
import threading

import uvicorn

from psi_kv_governor.service.address import LOOPBACK, Address
from psi_kv_governor.service.dashboard.app import make_app
from psi_kv_governor.service.dashboard.subject import Subject

_LOCAL = (LOOPBACK, "localhost", "::1", "[::1]")
_END_S = 1
"""How long streams are given to say that it is over."""


class DashboardServer:
    """The dashboard of `subject`, from its creation until `close`. `url` opens it."""

    def __init__(self, subject: Subject, address: Address) -> None:
        """Raises OSError where the address can't be listened at."""
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        listener = socket.create_server((address.host, address.port), family=family)
        host, port = listener.getsockname()[:2]
        self._subject = subject
        self._token = secrets.token_urlsafe(16)
        self.address = Address(host, port)
        app = make_app(
            subject,
            token=self._token,
            cookie=f"psikv_{port}",  # cookies know no ports: two dashboards would share one
            hosts=list(_LOCAL) if host in _LOCAL else ["*"],  # named from afar, it has names we don't know
            ended=lambda: self._server.should_exit,
        )
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=_END_S,
            ws="none",
        )
        self._server = uvicorn.Server(config)
        self._listener = listener
        self._thread = threading.Thread(
            target=self._server.run, args=([listener],), name="psi-kv-dashboard", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """The address with the token: whoever has it may look, park and limit."""
        return f"http://{self.address}/?token={self._token}"

    def wait(self) -> None:
        """Until it is closed."""
        self._thread.join()

    def close(self) -> None:
        """Serve no longer. Safe to call twice."""
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()
        self._subject.close()
