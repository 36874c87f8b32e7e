"""A client of the status socket, and what is waited for."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

from psi_kv_governor import socket_place


def until(condition) -> None:
    end_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def threads() -> int:
    return sum(thread.name == "psi-kv-status" for thread in threading.enumerate())


class Lines:
    """What a client reads."""

    def __init__(self, path: Path) -> None:
        self.connection = socket_place.connect(path, 5.0)
        self._file = self.connection.makefile("rb")

    def next(self) -> dict:
        return json.loads(self._file.readline())

    def close(self) -> None:
        self._file.close()
        self.connection.close()


def ask(client: Lines, command: dict | bytes) -> dict:
    line = command if isinstance(command, bytes) else json.dumps({"psi_kv_command": 1, **command}).encode()
    client.connection.sendall(line + b"\n")
    while (answer := client.next()).get("says") != "answer":
        pass
    return answer
