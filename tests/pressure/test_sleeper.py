"""The loop's sleep: how long it lasts, what ends it, and that nothing can keep it from being one."""

from __future__ import annotations

import gc
import os
import select
import threading
import time
import weakref

import pytest
from sensing_help import LONG_S, open_descriptors

from psi_kv_governor.errors import SourceLostError
from psi_kv_governor.pressure import sleeper as sleeper_module
from psi_kv_governor.pressure.sleeper import REST_S, Sleeper
from psi_kv_governor.pressure.waker import StreamWaker
from waiting import PATIENCE_S, until


def lasted_s(sleeper: Sleeper, timeout_s: float) -> float:
    before_s = time.monotonic()
    sleeper.wait(timeout_s)
    return time.monotonic() - before_s


@pytest.fixture(params=["poll", "no poll"])
def sleeper(request, monkeypatch):
    """A sleeper where there is poll, and one where there is not."""
    if request.param == "no poll":
        monkeypatch.delattr(select, "poll")
    made = Sleeper()
    yield made
    made.close()


@pytest.fixture
def piped():
    """A sleeper with a waker, and the descriptor to wake it by."""
    reading, writing = os.pipe()
    made = Sleeper()
    made.watch(StreamWaker("a pipe", reading))
    yield made, writing
    made.close()
    os.close(writing)


def test_it_sleeps_its_time(sleeper):
    lasts_s = [lasted_s(sleeper, 0.05) for _ in range(10)]
    assert 0.05 <= min(lasts_s) < 1.0  # any one may wait for a processor


@pytest.mark.parametrize("timeout_s", [0.0, -1.0])
def test_no_time_is_no_sleep(sleeper, timeout_s):
    assert min(lasted_s(sleeper, timeout_s) for _ in range(20)) < 0.01  # any one may wait for a processor


def test_another_thread_ends_the_sleep(sleeper):
    timer = threading.Timer(0.05, sleeper.wake)
    timer.start()
    assert lasted_s(sleeper, LONG_S) < PATIENCE_S
    timer.join()


def test_a_ring_before_the_sleep_ends_it_and_only_one(sleeper):
    for _ in range(3):
        sleeper.wake()
    assert lasted_s(sleeper, LONG_S) < PATIENCE_S
    assert lasted_s(sleeper, 0.05) >= 0.05


def test_a_hundred_thousand_wakes_block_nobody(sleeper):
    for _ in range(100_000):
        sleeper.wake()
    assert lasted_s(sleeper, LONG_S) < PATIENCE_S


@pytest.mark.parametrize("timeout_s", [1e9, float("inf")])
def test_a_sleep_without_an_end_can_be_ended(sleeper, timeout_s):
    sleeper.wake()
    assert lasted_s(sleeper, timeout_s) < PATIENCE_S


def test_a_waker_ends_the_sleep(piped):
    sleeper, writing = piped
    timer = threading.Timer(0.05, lambda: os.write(writing, b"x"))
    timer.start()
    assert lasted_s(sleeper, LONG_S) < PATIENCE_S
    timer.join()
    assert sleeper.lost == ""


def test_a_waker_that_never_stops_wakes_ten_times_a_second(piped):
    """Somebody who writes on and on: at most one reading in REST_S, and the processor stays free."""
    sleeper, writing = piped
    end = threading.Event()

    def flood() -> None:
        while not end.wait(0.001):
            os.write(writing, b"x" * 100)

    writer = threading.Thread(target=flood)
    writer.start()
    began_s, wakes = time.monotonic(), 11
    lasts_s = [lasted_s(sleeper, LONG_S) for _ in range(wakes)]
    took_s = time.monotonic() - began_s
    end.set()
    writer.join()
    assert max(lasts_s) < PATIENCE_S
    assert took_s >= (wakes - 1) * REST_S


def test_short_sleeps_stay_short_while_a_waker_rests(piped, monkeypatch):
    monkeypatch.setattr(sleeper_module, "REST_S", LONG_S)  # it rests however long this process stands still
    sleeper, writing = piped
    os.write(writing, b"x")
    assert lasted_s(sleeper, LONG_S) < PATIENCE_S
    os.write(writing, b"x")
    lasts_s = [lasted_s(sleeper, 0.02) for _ in range(10)]
    assert 0.02 <= min(lasts_s) < REST_S  # any one may wait for a processor


class Restless:
    """A waker whose descriptor is ready at all times, and which says of what that is a sign."""

    name = "restless"
    mask = select.POLLIN

    def __init__(self, pressure: bool) -> None:
        self._reading, self._writing = os.pipe()
        os.write(self._writing, b"x")
        self._pressure = pressure
        self.answers = 0

    def fileno(self) -> int:
        return self._reading

    def answer(self, events: int) -> bool:
        self.answers += 1
        return self._pressure

    def close(self) -> None:
        os.close(self._reading)
        os.close(self._writing)


def test_an_event_that_is_none_does_not_end_the_sleep_nor_spin(monkeypatch):
    sleeper, waker = Sleeper(), Restless(pressure=False)
    sleeper.watch(waker)
    before_s = time.thread_time()
    assert lasted_s(sleeper, 0.5) >= 0.5
    assert waker.answers <= 0.5 / REST_S + 2
    assert time.thread_time() - before_s < 0.2
    sleeper.close()


def test_a_dead_waker_is_said_dropped_and_wakes_once():
    reading, writing = os.pipe()
    sleeper = Sleeper()
    before = open_descriptors()
    sleeper.watch(StreamWaker("a pipe", reading))
    os.close(writing)
    assert lasted_s(sleeper, LONG_S) < PATIENCE_S
    assert (sleeper.lost, sleeper.lost_name) == ("a pipe was closed at its other end", "a pipe")
    assert sleeper.waker is None
    assert open_descriptors() == before - 2
    assert lasted_s(sleeper, 0.05) >= 0.05
    sleeper.close()


def test_another_waker_takes_the_place_of_the_first(piped):
    sleeper, writing = piped
    reading, other = os.pipe()
    sleeper.watch(StreamWaker("another", reading))
    with pytest.raises(BrokenPipeError):
        os.write(writing, b"x")  # it was closed
    os.write(other, b"x")
    assert lasted_s(sleeper, LONG_S) < PATIENCE_S
    os.close(other)


def test_a_closed_sleeper_wakes_who_sleeps_and_leaves_nothing_open(sleeper):
    before = open_descriptors()
    asleep = threading.Thread(target=sleeper.wait, args=(LONG_S,))
    asleep.start()
    until(lambda: sleeper._asleep)
    sleeper.close()
    asleep.join(PATIENCE_S)
    assert not asleep.is_alive()
    sleeper.close()
    sleeper.wake()
    assert open_descriptors() <= before - (2 if hasattr(select, "poll") else 0)
    assert lasted_s(sleeper, LONG_S) < PATIENCE_S  # woken once
    assert lasted_s(sleeper, 0.05) >= 0.05  # and no busy loop after it


def test_a_waker_given_to_a_closed_sleeper_is_closed():
    sleeper = Sleeper()
    sleeper.close()
    before = open_descriptors()
    reading, writing = os.pipe()
    sleeper.watch(StreamWaker("a pipe", reading))
    os.close(writing)
    assert open_descriptors() == before
    assert sleeper.waker is None


def test_a_waker_that_refuses_to_answer_is_as_good_as_dead():
    class Refuses(Restless):
        def answer(self, events: int) -> bool:
            raise SourceLostError("not today")

    sleeper = Sleeper()
    sleeper.watch(Refuses(pressure=True))
    sleeper.wait(LONG_S)
    assert sleeper.lost == "not today"
    sleeper.close()


def test_a_thousand_sleepers_leave_no_descriptor():
    before = open_descriptors()
    for _ in range(1000):
        sleeper = Sleeper()
        sleeper.wait(0.0)
        sleeper.close()
    assert open_descriptors() == before


def test_who_sleeps_on_it_keeps_nobody_else_alive():
    class Owner:
        def __init__(self) -> None:
            self.sleeper = Sleeper()
            weakref.finalize(self, self.sleeper.close)

    owner = Owner()
    bed = owner.sleeper
    sleeper = threading.Thread(target=bed.wait, args=(LONG_S,))
    sleeper.start()
    until(lambda: bed._asleep)
    left = weakref.ref(owner)
    del owner
    gc.collect()
    assert left() is None
    sleeper.join(PATIENCE_S)  # its end woke the sleeper
    assert not sleeper.is_alive()


def test_the_longest_sleep_fits_what_poll_takes():
    assert sleeper_module._LONGEST_S * 1000 < 2**31
