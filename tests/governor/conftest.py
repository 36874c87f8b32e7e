"""What the governor's tests share: a governor over a cache on paper and a machine set by hand."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
from governor_help import governors

from fakes import FakeSource
from psi_kv_governor import limits, psi_set_cache_limit
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.simulated import PaperSequence, SimulatedEngine
from psi_kv_governor.governor import Governor
from waiting import until

CONFIG = GovernorConfig(cooldown_s=0.0, quiet_s=2.0)


@pytest.fixture
def source() -> FakeSource:
    """A machine of which half a second passes with every reading."""
    return FakeSource(tick_s=0.5)


@pytest.fixture
def engine() -> SimulatedEngine:
    """A sequence of 3,000 tokens that is being decoded, in a cache of 4,096 cells."""
    made = SimulatedEngine()
    made.add_cache(4096)
    made.decode(3000)
    made.caches[1].sequence(0).running = True
    return made


@pytest.fixture
def sequence(engine) -> PaperSequence:
    return engine.caches[1].sequence(0)


@pytest.fixture
def open_governor(engine, source) -> Iterator[Callable[..., Governor]]:
    """Opens governors that act only when told to, and closes them afterwards."""
    opened = []

    def open_(**changes) -> Governor:
        made = Governor(
            changes.pop("engine", engine),
            **{"source": source, "config": CONFIG, "jitter": 0.0, **changes},
        )
        opened.append(made)
        return made

    yield open_
    for made in opened:
        made.close()


@pytest.fixture
def no_others() -> None:
    """What earlier tests of this worker dropped is gone with its threads: else one may end in between."""
    gc.collect()
    until(lambda: governors() == 0, "a governor of an earlier test was not closed")


@pytest.fixture
def limit() -> Iterator[Callable[[float | None], None]]:
    """`psi_set_cache_limit`, lifted afterwards."""
    yield psi_set_cache_limit
    psi_set_cache_limit(None)
    assert limits._of_process is None


@pytest.fixture
def events() -> list:
    """What a governor told; subscribe `events.append`."""
    return []
