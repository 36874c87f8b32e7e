"""No failure of anything else ends the loop or reaches who uses the model, and each is said once."""

from __future__ import annotations

import logging
import os
import signal
import threading

import pytest
from governor_help import counts, governors, of_kind, steps, until

from fakes import FakeSource
from psi_kv_governor import sensor as sensor_module
from psi_kv_governor.cache import Result
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.simulated import SimulatedEngine
from psi_kv_governor.errors import EngineError
from psi_kv_governor.events import Degraded, SourceChanged, Trimmed
from psi_kv_governor.policy import get_policy
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
    assert counts(engine).live == 3000
    source.stall = 1.0
    governor.step()
    assert counts(engine).live == 3000


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_subscriber_may_close_the_governor(open_governor, source, by_hand):
    governor = open_governor()
    governor.subscribe(lambda event: governor.close())
    if by_hand:
        assert governor.trim(0.5).cells > 0
    else:
        source.stall = 1.0
        governor.start()
        until(lambda: governors() == 0)
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
    governor.step()
    assert governor.status().source == "the next best"
    assert governor.status().mode.value == "trimming"


def test_the_lack_of_a_source_is_said_once_in_the_log(open_governor, monkeypatch, caplog):
    monkeypatch.setattr(sensor_module, "discover", lambda **_: Discovery(None, []))
    governor = open_governor(source=None)
    assert governor.status().source == "none"
    steps(governor, 5)
    assert [record.message for record in caplog.records] == [
        "sensing: no source of memory pressure here (see `psi-kv doctor`)"
    ]


# -- the engine --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["describe", "snapshot", "apply", "evidence"])
@pytest.mark.parametrize(
    "error", [EngineError("the program is gone"), RuntimeError("what nobody thought of")]
)
def test_an_engine_that_fails_is_said_once_and_tried_again(  # noqa: PLR0917
    open_governor, source, engine, events, monkeypatch, call, error
):
    def fail(*_) -> None:
        raise error

    governor = open_governor()
    governor.subscribe(events.append)
    monkeypatch.setattr(engine, call, fail)
    source.stall = 1.0
    for _ in range(4):
        assert governor.step() > 0.0
    assert len(of_kind(events, Degraded)) <= 1
    if call != "evidence" or isinstance(error, RuntimeError):
        assert str(error) in of_kind(events, Degraded)[0].why
    monkeypatch.undo()
    steps(governor, 2)
    assert counts(engine).masked > 0


def test_what_the_machine_refuses_is_said_once_whatever_the_figures(open_governor, source, events):
    class Full(SimulatedEngine):
        tried = 0

        def apply(self, plan) -> Result:
            self.tried += 1
            return Result(problem=f"the disk is full: {self.tried} bytes are missing")

    full = Full()
    full.add_cache(4096).sequence(0).running = True
    full.decode(3000)
    governor = open_governor(engine=full)
    governor.subscribe(events.append)
    source.stall = 1.0
    steps(governor, 5)
    assert full.tried > 1
    assert len(of_kind(events, Degraded)) == 1
    assert of_kind(events, Trimmed) == []


def test_a_turn_that_fails_does_not_end_the_thread(open_governor, source, engine, monkeypatch, caplog):
    governor = open_governor(config=GovernorConfig(poll_s=0.01, poll_busy_s=0.01))
    snapshot = engine.snapshot

    def broken():
        monkeypatch.setattr(engine, "snapshot", snapshot)
        raise RuntimeError("what nobody thought of")

    monkeypatch.setattr(engine, "snapshot", broken)
    governor.start()
    until(lambda: any("what nobody thought of" in record.message for record in caplog.records))
    source.stall = 1.0
    until(lambda: counts(engine).masked > 0)


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_policy_that_fails_stops_no_trim(  # noqa: PLR0917
    open_governor, source, engine, events, monkeypatch, by_hand
):
    policy = get_policy("attention")
    monkeypatch.setattr(type(policy), "score", lambda *_: 1 / 0)
    governor = open_governor(policy=policy)
    governor.subscribe(events.append)
    source.stall = 1.0
    for _ in range(3):
        governor.trim(0.2) if by_hand else governor.step()
    assert counts(engine).masked > 0
    assert [event.what for event in of_kind(events, Degraded)] == ["policy"]


def test_an_engine_that_is_gone_leaves_a_status_without_caches(open_governor, engine):
    governor = open_governor()
    engine.close()
    assert governor.status().caches == ()


# -- Ctrl-C ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["trim", "restore", "park", "unpark"])
def test_ctrl_c_while_a_plan_is_carried_out_leaves_no_lock_closed(open_governor, engine, monkeypatch, verb):
    """The caller's thread only waits: what it is interrupted in goes on to its end."""
    governor = open_governor()
    governor.trim(0.5)
    apply = engine.apply
    begun, go_on, finished = threading.Event(), threading.Event(), threading.Event()

    def slow(plan) -> Result:
        begun.set()
        assert go_on.wait(10)
        result = apply(plan)
        finished.set()
        return result

    monkeypatch.setattr(engine, "apply", slow)
    main = threading.main_thread().ident

    def interrupt() -> None:
        begun.wait(10)
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        getattr(governor, verb)()
    go_on.set()
    assert finished.wait(10)
    monkeypatch.undo()
    governor.restore()
    assert governor.trim(0.5).cells > 0
    assert not governor._applying.locked()


def test_ctrl_c_in_a_turn_leaves_no_lock_closed(open_governor, source, engine, monkeypatch):
    def interrupted(_) -> None:
        raise KeyboardInterrupt

    governor = open_governor()
    source.stall = 1.0
    monkeypatch.setattr(engine, "apply", interrupted)
    with pytest.raises(KeyboardInterrupt):  # somebody who calls step() himself
        governor.step()
    monkeypatch.undo()
    assert governor.trim(0.5).cells > 0


# -- forks -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
@pytest.mark.parametrize("while_it_works", [False, True])
def test_a_forked_child_is_ungoverned_and_nothing_waits_for_its_parents_threads(
    open_governor, source, engine, while_it_works
):
    governor = open_governor()
    governor.start()
    if while_it_works:
        governor._applying.acquire()  # a thread that did not come along holds it
    child = os.fork()
    if child == 0:
        status = 1
        try:
            logging.disable()
            ok = governor.has_room() and governor.trim(0.1).cells > 0 and governor.restore().cells > 0
            governor.start()
            governor.close()
            status = 0 if ok and governors() == 0 else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if while_it_works:
        governor._applying.release()
    assert os.waitstatus_to_exitcode(status) == 0
    assert governors() == 1
    assert counts(engine).live == 3000
    assert governor.trim(0.1).cells > 0


def test_after_close_by_another_thread_what_was_asked_is_still_done(open_governor, engine, monkeypatch):
    governor = open_governor()
    governor._hand.shutdown()  # as `close` does, between the question and its being handed over
    assert governor.trim(0.5).cells > 0
