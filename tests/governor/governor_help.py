"""Steps that the governor's tests repeat."""

from __future__ import annotations

import threading

import pytest

from psi_kv_governor.cache import Plan, SequenceState
from psi_kv_governor.engines.simulated import SimulatedEngine
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.governor import Governor


def of_kind(events: list, kind: type) -> list:
    """The events of one kind, in the order in which they were told."""
    return [event for event in events if isinstance(event, kind)]


def steps(governor: Governor, n: int) -> None:
    """So many turns of the loop."""
    for _ in range(n):
        governor.step()


def governors() -> int:
    """Threads of governors in this process; to be counted by a test with the fixture `no_others`."""
    return sum(thread.name == "psi-kv-governor" for thread in threading.enumerate())


def state(engine: SimulatedEngine, sequence: int = 0, cache: int = 1) -> SequenceState:
    """How a sequence stands."""
    now = engine.snapshot()
    held = next(one for one in now.caches if one.id == cache)
    return next(one for one in held.sequences if one.id == sequence)


def plans_of(engine: SimulatedEngine, monkeypatch) -> list[Plan]:
    """The plans that an engine is given from now on."""
    given, apply = [], engine.apply

    def noted(plan: Plan):
        given.append(plan)
        return apply(plan)

    monkeypatch.setattr(engine, "apply", noted)
    return given


def refused(call, words: str) -> None:
    with pytest.raises(BadInputError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
    assert error.value.exit_status == 2
