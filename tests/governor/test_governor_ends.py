"""Bounds of time and of what is written, and Ctrl-C at any line."""

from __future__ import annotations

import math
import sys
import threading

import pytest
from governor_help import governors, of_kind, plans_of, state, steps

from fakes import FakeSource
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.simulated import CELL_BYTES, SimulatedEngine
from psi_kv_governor.events import Degraded, Trimmed
from psi_kv_governor.policy.planner import TRIM_S
from psi_kv_governor.worker import Worker

# -- how long, and how much --------------------------------------------------------------------------------


def test_an_urgent_trim_ends_after_half_a_second_and_one_by_hand_takes_its_time(
    open_governor, source, engine, monkeypatch
):
    plans = plans_of(engine, monkeypatch)
    governor = open_governor()
    governor.trim(0.1)
    source.stall = 1.0
    governor.step()
    assert [plan.deadline_s for plan in plans] == [math.inf, TRIM_S]
    assert [plan.urgent for plan in plans] == [False, True]


def test_what_may_be_written_in_a_day_holds_back_all_but_what_is_urgent(
    open_governor, source, engine, events
):
    governor = open_governor(
        config=GovernorConfig(cooldown_s=0.0, write_limit_bytes_per_day=64 * CELL_BYTES, acute_full=1.0)
    )
    governor.subscribe(events.append)
    source.stall = 0.5
    steps(governor, 6)
    assert len(of_kind(events, Trimmed)) == 1
    assert ["write_limit_bytes_per_day" in event.why for event in of_kind(events, Degraded)] == [True]
    source.stall = 1.0
    steps(governor, 2)
    assert len(of_kind(events, Trimmed)) > 1


# -- Ctrl-C ------------------------------------------------------------------------------------------------


def interrupted_at(line: int, action) -> bool:
    """Run `action` with a KeyboardInterrupt raised at that line of Python that this thread comes to. False
    where it was over before. What hits a callback of the garbage collector goes nowhere, but was raised."""
    count = 0

    def local(frame, event, argument):
        nonlocal count
        if event == "line":
            count += 1
            if count == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return local

    sys.settrace(local)
    try:
        action()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return count >= line


def let_both_threads_finish(worker: Worker) -> None:
    """What a call that was interrupted has asked for is done all the same, and by now: both threads are here.

    One of them may have stood still with such a trim in its hands, which came after the restore then.
    """
    both = threading.Barrier(2)
    other = threading.Thread(target=lambda: worker.do(both.wait))
    other.start()
    worker.do(both.wait)
    other.join()


@pytest.mark.parametrize("action", ["trim", "restore", "park", "unpark", "status"])
def test_ctrl_c_at_any_line_leaves_no_lock_closed(engine, source, action):
    governor = open_governor_on(engine, source)
    line = 1
    while interrupted_at(line, getattr(governor, action)):
        line += 1
        now = governor.status()
        assert now.live_cells + now.masked_cells == 3000
    assert line > 3
    let_both_threads_finish(governor._worker)
    assert governor.trim(1.0).cells + state(engine).masked_cells > 0
    assert governor.restore().problem == ""
    governor.step()
    governor.close()
    assert state(engine).live_cells == 3000


def open_governor_on(engine: SimulatedEngine, source: FakeSource):
    from psi_kv_governor.governor import Governor

    return Governor(engine, source=source, config=GovernorConfig())


@pytest.mark.usefixtures("no_others")
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # one hits a weakref's callback
def test_ctrl_c_at_any_line_of_a_close_lets_it_be_closed_again(engine, source):
    line = 1
    while True:
        governor = open_governor_on(engine, source)
        governor.start()
        was_interrupted = interrupted_at(line, governor.close)
        governor.close()
        assert governors() == 0
        if not was_interrupted:
            break
        line += 1
    assert line > 5


def test_what_comes_while_a_worker_ends_is_done_all_the_same():
    worker = Worker("a test", 2)
    worker.close()
    assert worker.do(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        worker.do(lambda: 1 // 0)
