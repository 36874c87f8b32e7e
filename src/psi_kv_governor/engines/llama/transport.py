"""How requests reach an agent in another process."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

from psi_kv_governor.errors import EngineError

_LENGTH = struct.Struct("<I")
_ANSWER_S = 60.0
"""Longest that an agent may take to answer. A plan ends by its deadline, but a thrashing machine is slow."""


class OtherVersionError(EngineError):
    """The agent speaks another version of the protocol."""

    def __init__(self) -> None:
        super().__init__("its agent is of another version than this psi-kv")


class SocketTransport:
    """Carries requests to an agent in another process. Raises EngineError when it is gone."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._connection.settimeout(_ANSWER_S)
        self._lock = threading.Lock()

    def __call__(self, request: bytes) -> bytes:
        with self._lock:
            try:
                self._connection.sendall(_LENGTH.pack(len(request)) + request)
                (n,) = _LENGTH.unpack(self._read(_LENGTH.size))
                if n == 0:
                    raise OtherVersionError
                return self._read(n)
            except OSError as error:
                self.close()  # half a message may be under way
                raise EngineError(f"the program is gone: {error}") from error

    def _read(self, n: int) -> bytes:
        parts = []
        while n:
            part = self._connection.recv(min(n, 1 << 20))
            if not part:
                raise ConnectionResetError("it closed the connection")
            parts.append(part)
            n -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        """End the connection. The agent takes its masks off."""
        with contextlib.suppress(OSError):
            self._connection.close()
