"""A client of the status socket, and what is waited for."""

from __future__ import annotations

import json
from pathlib import Path

from fakes import FakeSource
from psi_kv_governor import socket_place
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.simulated import SimulatedEngine
from psi_kv_governor.governor import Governor
from waiting import PATIENCE_S


class Lines:
    """What a client reads."""

    def __init__(self, path: Path) -> None:
        self.connection = socket_place.connect(path, PATIENCE_S)
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


def two_sequences_pressed() -> Governor:
    """A governor of a running sequence, an idle one and a saved state, on a machine under pressure."""
    engine = SimulatedEngine()
    engine.add_cache(4096).sequence(0).running = True
    engine.decode(3000)
    engine.decode(400, sequence=3)
    engine.caches[1].sequence(3).running = False
    engine.save(5 << 20)
    config = GovernorConfig(status_socket=False)
    return Governor(engine, source=FakeSource(0.6, tick_s=0.5), config=config, name="my program")
