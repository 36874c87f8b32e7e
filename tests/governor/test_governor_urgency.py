"""What is urgent is not waited for, and what the governor did itself is not held against the machine."""

from __future__ import annotations

import math
import time

import pytest
from governor_help import of_kind, steps

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.events import Degraded, Trimmed
from psi_kv_governor.own_work import OwnWork
from psi_kv_governor.pressure.reading import Reading

MB = 1_000_000


@pytest.fixture
def asked(engine, monkeypatch) -> list[tuple[str, float]]:
    """How long the engine was told to wait for a decode, and how long to write."""
    told: list[tuple[str, float]] = []
    at_safe_point, trim = engine.at_safe_point, engine.trim

    def wait(patience_s=math.inf):
        told.append(("patience", patience_s))
        return at_safe_point(patience_s)

    def give_up(ranges, store, deadline_s=math.inf):
        told.append(("deadline", deadline_s))
        return trim(ranges, store, deadline_s)

    monkeypatch.setattr(engine, "at_safe_point", wait)
    monkeypatch.setattr(engine, "trim", give_up)
    return told


def test_memory_that_is_about_to_be_gone_interrupts_a_decode_at_once(open_governor, source, asked):
    governor = open_governor()
    source.limit_bytes, source.headroom_bytes = 1000 * MB, 10 * MB
    governor.step()
    assert asked == [("patience", 0.0), ("deadline", 0.5)]


def test_small_steps_give_a_decode_some_time(open_governor, source, asked):
    governor = open_governor()
    source.limit_bytes, source.headroom_bytes = 1000 * MB, 35 * MB
    governor.step()
    assert asked == [("patience", 0.1), ("deadline", 2.0)]


def test_a_trim_by_hand_gives_a_decode_some_time_too(open_governor, asked):
    open_governor(config=GovernorConfig(interrupt_after_s=0.7, spill_deadline_s=3.0)).trim(0.2)
    assert asked == [("patience", 0.7), ("deadline", 3.0)]


def reading(begin_s: float, end_s: float) -> Reading:
    return Reading(time_s=end_s, interval_s=end_s - begin_s, some=1.0, full=1.0)


def test_the_share_of_an_interval_that_was_own_work_is_told():
    work, begin_s = OwnWork(), time.monotonic()
    time.sleep(0.05)
    with work:
        time.sleep(0.05)
    end_s = time.monotonic()
    share = work.taken_off(reading(begin_s, end_s)).own
    assert 0.05 / (end_s - begin_s) - 0.01 <= share < 1.0
    assert work.taken_off(reading(end_s, end_s + 0.1)).own == 0.0  # what came after it was not
    assert work.taken_off(reading(begin_s - 1, begin_s)).own == 0.0


def test_work_that_still_goes_on_counts_and_work_in_two_threads_counts_once():
    work, begin_s = OwnWork(), time.monotonic()
    with work, work:
        time.sleep(0.02)
        assert work.taken_off(reading(begin_s, time.monotonic())).own == pytest.approx(1.0, abs=0.2)
    assert work.taken_off(reading(begin_s, time.monotonic())).own <= 1.0


def test_a_reading_without_an_interval_has_no_own_share():
    work = OwnWork()
    with work:
        assert work.taken_off(reading(1.0, 1.0)).own == 0.0


def test_stall_of_its_own_restoring_does_not_make_it_trim_again(open_governor, engine, monkeypatch, events):
    """The machine stalls exactly while the governor restores: the answer to that is not another trim."""
    restore = engine.restore

    def slowly(*arguments):
        time.sleep(0.05)
        return restore(*arguments)

    monkeypatch.setattr(engine, "restore", slowly)

    class Busy:
        """Real time; stall is the governor's own work of the last interval."""

        name = "a machine that stalls when it is worked"

        def __init__(self) -> None:
            self.last_s = time.monotonic()
            self.readings: list[Reading] = []

        def read(self) -> Reading:
            now_s = time.monotonic()
            look = reading(self.last_s, now_s)
            lost = governor._acting.work.taken_off(look).own
            self.last_s = now_s
            self.readings.append(Reading(time_s=now_s, interval_s=look.interval_s, some=lost, full=lost))
            return self.readings[-1]

        def close(self) -> None: ...

    busy = Busy()
    governor = open_governor(source=busy, config=GovernorConfig(quiet_s=0.02))
    governor.subscribe(events.append)
    governor.trim(0.5)
    for _ in range(40):
        governor.step()
        time.sleep(0.005)
    assert max(look.some for look in busy.readings) > 0.5
    assert governor.status().spilled_cells == 0
    assert [event.reason for event in of_kind(events, Trimmed)] == ["by hand"]


def test_a_store_that_is_too_slow_for_an_urgent_trim_is_passed_by(open_governor, source, store, events):
    governor = open_governor()
    governor.subscribe(events.append)
    store.write_bytes_per_s = 1 * MB  # a block of 64 cells takes 1.5 s
    source.limit_bytes, source.headroom_bytes = 1000 * MB, 10 * MB
    steps(governor, 1)
    assert [event.spilled for event in of_kind(events, Trimmed)] == [0]
    assert "1 MB/s" in of_kind(events, Degraded)[0].why
