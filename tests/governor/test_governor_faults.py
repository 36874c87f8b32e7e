"""No failure of anything else ends the loop, and each is said once."""

from __future__ import annotations

import pytest
from governor_help import of_kind, steps, until

from fakes import FakeSource
from psi_kv_governor import sensor as sensor_module
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import Mode
from psi_kv_governor.engine.simulated import SimulatedStore
from psi_kv_governor.errors import EngineError, StoreError, StoreFullError
from psi_kv_governor.events import Degraded, SourceChanged, Trimmed
from psi_kv_governor.ledger import LIVE, LOST, SPILLED
from psi_kv_governor.pressure.discovery import Discovery

pytestmark = pytest.mark.timeout(60)


def test_a_subscriber_that_raises_is_dropped_and_the_rest_goes_on(open_governor, source, events, caplog):
    governor = open_governor()
    calls = []

    def bad(event) -> None:
        calls.append(event)
        raise ValueError("not today")

    governor.subscribe(bad)
    governor.subscribe(events.append)
    source.stall = 1.0
    steps(governor, 3)
    assert len(calls) == 1
    assert len(of_kind(events, Trimmed)) == 3
    assert sum("is dropped" in record.message for record in caplog.records) == 1


def test_a_subscriber_may_end_its_subscription_and_fail(open_governor):
    governor = open_governor()

    def once(_) -> None:
        unsubscribe()
        raise ValueError("not today")

    unsubscribe = governor.subscribe(once)
    assert governor.trim(0.5).cells > 0
    unsubscribe()


def test_an_ended_subscription_is_told_nothing(open_governor, events):
    governor = open_governor()
    unsubscribe = governor.subscribe(events.append)
    governor.trim(0.1)
    told = len(events)
    unsubscribe()
    unsubscribe()
    governor.restore()
    assert len(events) == told > 0


def test_a_subscriber_may_act(open_governor, source, engine):
    """By hand or by itself: a subscriber that asks for more is not left waiting for itself."""
    governor = open_governor()

    def undo(event) -> None:
        if isinstance(event, Trimmed):
            governor.restore()

    governor.subscribe(undo)
    assert governor.trim(0.5).cells > 0
    assert engine.ledger.count(LIVE) == 3000
    source.stall = 1.0
    governor.step()
    assert engine.ledger.count(LIVE) == 3000


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_subscriber_may_close_the_governor(open_governor, source, by_hand):
    governor = open_governor()
    governor.subscribe(lambda event: governor.close())
    if by_hand:
        assert governor.trim(0.5).cells > 0
    else:
        source.stall = 1.0
        governor.start()
        governor._thread.join(10)
        assert not governor._thread.is_alive()
    governor.close()


def test_a_source_that_is_lost_is_replaced(open_governor, source, events, monkeypatch):
    other = FakeSource(stall=1.0)
    other.name = "the next best"
    monkeypatch.setattr(sensor_module, "discover", lambda **_: Discovery(other, []))
    governor = open_governor()
    governor.subscribe(events.append)
    source.lost = "it no longer answers: no such device"
    governor.step()
    changed = of_kind(events, SourceChanged)
    assert [(event.source, event.why) for event in changed] == [("the next best", source.lost)]
    assert source.closed == 0  # it was given, and is closed by whoever made it
    assert governor.status().source == "the next best"
    governor.step()
    assert governor.status().mode is Mode.TRIMMING


def test_without_any_source_it_says_so_once_and_looks_again_later(open_governor, source, events, monkeypatch):
    looks, found = [], []

    def look(**_) -> Discovery:
        looks.append(1)
        return Discovery(found[0] if found else None, [])

    monkeypatch.setattr(sensor_module, "discover", look)
    governor = open_governor(source=None)
    governor.subscribe(events.append)
    assert governor.status().source == "none"
    steps(governor, 5)
    assert len(looks) == 1  # not at every turn
    found.append(source)
    monkeypatch.setattr(governor._sensor, "_look_again_s", 0.0)
    steps(governor, 2)
    assert governor.status().source == source.name
    assert [event.source for event in of_kind(events, SourceChanged)] == [source.name]
    assert of_kind(events, Degraded) == []  # it was said at the start, before anybody listened


def test_the_lack_of_a_source_is_in_the_log(open_governor, monkeypatch, caplog):
    monkeypatch.setattr(sensor_module, "discover", lambda **_: Discovery(None, []))
    open_governor(source=None)
    assert [record.message for record in caplog.records] == [
        "sensing: no source of memory pressure here (see `psi-kv doctor`)"
    ]


class BadStore(SimulatedStore):
    def put(self, tag, n_bytes, chunks) -> int:
        raise StoreError("the disk is on fire")


def test_a_store_that_fails_is_said_once_and_cells_are_evicted(open_governor, source, engine, events):
    governor = open_governor(store=BadStore(0))
    governor.subscribe(events.append)
    source.stall = 1.0
    steps(governor, 5)
    assert [event.why for event in of_kind(events, Degraded)] == ["the disk is on fire"]
    assert all(event.cells > 0 and event.spilled == 0 for event in of_kind(events, Trimmed))
    assert engine.ledger.count(LOST) > 0


class FullStore(SimulatedStore):
    """Takes nothing, and has other figures every time, as a store has."""

    def put(self, tag, n_bytes, chunks) -> int:
        self._used_bytes += 1
        raise StoreFullError(f"{n_bytes} bytes more would pass the limit: {self._used_bytes} are used")


def test_a_full_store_is_one_cause_whatever_the_figures(open_governor, source, engine, events):
    governor = open_governor(store=FullStore(0))
    governor.subscribe(events.append)
    source.stall = 1.0
    steps(governor, 5)
    assert engine.ledger.count(LOST) > 0
    assert len(of_kind(events, Trimmed)) > 1
    assert len(of_kind(events, Degraded)) == 1


def test_a_store_that_is_too_slow_is_not_waited_for(open_governor, source, engine, events):
    class Slow(SimulatedStore):
        write_bytes_per_s = 1e6

    governor = open_governor(store=Slow(1 << 30))
    governor.subscribe(events.append)
    source.stall = 1.0
    steps(governor, 3)
    assert engine.ledger.count(SPILLED) == 0
    assert [event.what for event in of_kind(events, Degraded)] == ["spill"]
    assert "1 MB/s" in of_kind(events, Degraded)[0].why


def test_an_engine_that_refuses_is_said_once(open_governor, source, engine, events, monkeypatch):
    def refuse(*_) -> None:
        raise EngineError("this cache can't give up a range")

    governor = open_governor()
    governor.subscribe(events.append)
    monkeypatch.setattr(engine, "trim", refuse)
    source.stall = 1.0
    steps(governor, 4)
    assert [(event.what, event.why) for event in of_kind(events, Degraded)] == [
        ("trim", "this cache can't give up a range")
    ]
    monkeypatch.undo()
    governor.step()
    assert engine.ledger.count(SPILLED) > 0


def test_a_turn_that_fails_does_not_end_the_thread(open_governor, source, engine, monkeypatch, caplog):
    governor = open_governor(config=GovernorConfig(poll_s=0.01, poll_busy_s=0.01))
    release = engine.release

    def broken() -> int:
        monkeypatch.setattr(engine, "release", release)
        raise RuntimeError("what nobody thought of")

    monkeypatch.setattr(engine, "release", broken)
    governor.start()
    until(lambda: any("goes on" in record.message for record in caplog.records))
    source.stall = 1.0
    until(lambda: engine.ledger.count(SPILLED) > 0)
