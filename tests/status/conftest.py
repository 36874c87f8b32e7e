"""A governor whose status socket is open, and a client of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from status_help import Lines

from fakes import FakeSource
from psi_kv_governor import socket_place
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.simulated import SimulatedEngine
from psi_kv_governor.governor import Governor
from psi_kv_governor.status_socket import StatusSocket


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch) -> Path:
    """The only folder in which sockets are looked for."""
    folder = tmp_path / "s"
    monkeypatch.setattr(socket_place, "folders", lambda: iter([folder]))
    return folder


@pytest.fixture
def governor():
    engine = SimulatedEngine()
    engine.add_cache(4096).sequence(0).running = True
    engine.decode(3000)
    config = GovernorConfig(cooldown_s=0.0, status_socket=False)
    made = Governor(engine, source=FakeSource(tick_s=0.5), config=config, name="my program")
    yield made
    made.close()


@pytest.fixture
def opened(governor):
    made = StatusSocket(governor)
    made.start()
    yield made
    made.close()


@pytest.fixture
def client(opened):
    made = Lines(opened.path)
    yield made
    made.close()
