"""What the tests of the services share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from service_help import paper

from fakes import FakeSource
from psi_kv_governor.engines.simulated import SimulatedEngine
from psi_kv_governor.governor import Governor


@pytest.fixture
def machine() -> Iterator[tuple[Governor, SimulatedEngine, FakeSource]]:
    made = paper()
    yield made
    made[0].close()


@pytest.fixture
def governor(machine) -> Governor:
    return machine[0]


@pytest.fixture
def engine(machine) -> SimulatedEngine:
    return machine[1]


@pytest.fixture
def source(machine) -> FakeSource:
    return machine[2]
