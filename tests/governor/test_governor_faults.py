"""No failure of anything else ends the loop, and each is said once."""

from __future__ import annotations

import threading

import pytest
from governor_help import governors, of_kind, state, steps

from fakes import FakeSource
from psi_kv_governor import sensor as sensor_module
from psi_kv_governor.cache import Result
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import Mode
from psi_kv_governor.errors import EngineError
from psi_kv_governor.events import CacheClosed, Degraded, SourceChanged, Trimmed
from psi_kv_governor.policy import Policy
from psi_kv_governor.pressure.discovery import Discovery
from waiting import until

# -- subscribers -------------------------------------------------------------------------------------------


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
    assert state(engine).live_cells == 3000
    source.stall = 1.0
    governor.step()
    assert state(engine).live_cells == 3000


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_subscriber_may_close_the_governor(open_governor, source, by_hand):
    governor = open_governor()
    governor.subscribe(lambda event: governor.close())
    if by_hand:
        assert governor.trim(0.5).cells > 0
    else:
        source.stall = 1.0
        governor.start()
        until(lambda: not governor._thread.is_alive())
    governor.close()


# -- sources -----------------------------------------------------------------------------------------------


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


def test_a_source_that_raises_what_nobody_thought_of_is_said_once(open_governor, source, events, monkeypatch):
    governor = open_governor()
    governor.subscribe(events.append)
    monkeypatch.setattr(source, "read", lambda: 1 // 0)
    steps(governor, 3)
    assert [event.what for event in of_kind(events, Degraded)] == ["governor"]


# -- engines -----------------------------------------------------------------------------------------------


def test_what_an_engine_could_not_do_is_said_once_whatever_the_figures(
    open_governor, source, engine, events, monkeypatch
):
    figures = iter(range(100))
    monkeypatch.setattr(
        engine, "apply", lambda _: Result(problem=f"no space left on the disk, {next(figures)} bytes free")
    )
    governor = open_governor()
    governor.subscribe(events.append)
    source.stall = 1.0
    steps(governor, 5)
    assert [event.why for event in of_kind(events, Degraded)] == ["no space left on the disk, 0 bytes free"]
    assert of_kind(events, Trimmed) == []


@pytest.mark.parametrize("call", ["snapshot", "apply", "describe"])
def test_an_engine_that_raises_anything_is_said_once_and_the_loop_goes_on(
    open_governor, source, engine, monkeypatch, call
):
    governor, events = open_governor(), []
    governor.subscribe(events.append)

    def broken(*_):
        raise RuntimeError("what nobody\nthought of")

    monkeypatch.setattr(engine, call, broken)
    source.stall = 1.0
    steps(governor, 4)
    assert [(event.what, event.why) for event in of_kind(events, Degraded)] == [
        ("governor", "a turn failed (RuntimeError: what nobody thought of)")
    ]
    monkeypatch.undo()
    governor.step()
    assert state(engine).masked_cells > 0


@pytest.mark.parametrize("call", ["snapshot", "apply", "describe", "collect"])
def test_the_thread_survives_an_engine_that_raises(open_governor, source, engine, monkeypatch, call):
    working = getattr(engine, call)
    calls = []

    def broken(*arguments):
        calls.append(arguments)
        if len(calls) < 3:
            raise RuntimeError("what nobody thought of")
        return working(*arguments)

    monkeypatch.setattr("psi_kv_governor.governor._FAILED_S", 0.01)
    monkeypatch.setattr(engine, call, broken)
    governor = open_governor(config=GovernorConfig(poll_s=0.01, poll_busy_s=0.01))
    source.stall = 1.0
    governor.start()
    until(lambda: state(engine).masked_cells > 0 if call != "snapshot" else len(calls) > 3)


@pytest.mark.usefixtures("no_others")
def test_an_engine_that_is_gone_ends_the_governor_quietly(open_governor, source, engine, events, caplog):
    governor = open_governor(config=GovernorConfig(poll_s=0.01, poll_busy_s=0.01))
    governor.subscribe(events.append)
    source.stall = 1.0
    governor.start()
    until(lambda: of_kind(events, Trimmed) != [])
    engine.close()
    until(lambda: governors() == 0)
    assert [event.cache for event in of_kind(events, CacheClosed)] == [1]
    assert of_kind(events, Degraded) == []
    assert caplog.records == []
    assert governor.has_room()
    with pytest.raises(EngineError):
        governor.trim()


def test_a_status_of_a_broken_engine_has_no_caches_and_raises_nothing(open_governor, engine, monkeypatch):
    governor = open_governor()
    monkeypatch.setattr(engine, "snapshot", lambda: 1 // 0)
    assert governor.status().caches == ()


def test_calls_of_an_engine_come_one_at_a_time(open_governor, source, engine, monkeypatch):
    inside, most = [], []

    def watched(call):
        def one(*arguments):
            inside.append(1)
            most.append(len(inside))
            try:
                return call(*arguments)
            finally:
                inside.pop()

        return one

    for name in ("snapshot", "apply", "describe", "evidence"):
        monkeypatch.setattr(engine, name, watched(getattr(engine, name)))
    governor = open_governor(config=GovernorConfig(poll_s=0.001, poll_busy_s=0.001, cooldown_s=0.0))
    source.stall = 1.0
    governor.start()
    threads = [
        threading.Thread(target=lambda act=act: [act() for _ in range(30)])
        for act in (governor.status, governor.trim, governor.restore, governor.status)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) > 100
    assert max(most) == 1


# -- policies ----------------------------------------------------------------------------------------------


class Broken(Policy):
    """Divides by zero."""

    name = "broken"
    source = "a test"

    def score(self, blocks, next_position, evidence):
        raise ZeroDivisionError("not today")


def test_a_policy_that_fails_is_said_once_and_memory_goes_all_the_same(open_governor, source, engine, events):
    governor = open_governor(policy=Broken())
    governor.subscribe(events.append)
    source.stall = 1.0
    steps(governor, 4)
    assert [event.what for event in of_kind(events, Degraded)] == ["policy"]
    assert state(engine).masked_cells > 0
