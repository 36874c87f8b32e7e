"""The lock on a context: one at a time, again by the same thread, the urgent first, whatever is raised."""

from __future__ import annotations

import contextlib
import signal
import threading
import time

import numpy as np
import pytest

from psi_kv_governor.engine.llama.safepoint import SafePoint

SOON_S = 10.0  # far more than anything here takes


def in_thread(action) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def test_one_thread_may_hold_it_again():
    guard = SafePoint()
    with guard.hold(), guard.hold(urgent=True), guard.hold():
        pass
    assert free(guard)


def free(guard: SafePoint) -> bool:
    """Whether another thread can have it now, urgent or not."""
    got = []

    def take() -> None:
        for urgent in (False, True):
            with guard.hold(urgent=urgent):
                got.append(urgent)

    in_thread(take).join(1.0)
    return got == [False, True]


def test_two_threads_are_never_inside_together():
    guard, inside, most, turns = SafePoint(), [], [0], 200

    def work(urgent: bool) -> None:
        for _ in range(turns):
            with guard.hold(urgent=urgent):
                inside.append(1)
                most[0] = max(most[0], len(inside))
                time.sleep(0)
                inside.pop()

    threads = [in_thread(lambda urgent=urgent: work(urgent)) for urgent in (False, True, False, True)]
    for thread in threads:
        thread.join(SOON_S)
    assert not any(thread.is_alive() for thread in threads)
    assert most == [1]


def test_the_urgent_one_goes_before_the_others():
    guard, order = SafePoint(), []

    def take(name: str, urgent: bool) -> None:
        with guard.hold(urgent=urgent):
            order.append(name)

    with guard.hold():
        threads = [in_thread(lambda: take("urgent", True))]
        until(lambda: guard._urgent_waiting == 1)
        threads += [in_thread(lambda name=name: take(name, False)) for name in "abc"]
    for thread in threads:
        thread.join(SOON_S)
    assert order[0] == "urgent"
    assert sorted(order[1:]) == ["a", "b", "c"]


def until(condition) -> None:
    end = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_thread_that_decodes_token_after_token_lets_the_governor_in():
    guard, stop, got = SafePoint(), threading.Event(), threading.Event()

    def decode() -> None:
        while not stop.is_set():
            with guard.hold():
                time.sleep(0.001)

    def trim() -> None:
        with guard.hold(urgent=True):
            got.set()

    decoding = in_thread(decode)
    begin = time.monotonic()
    in_thread(trim)
    assert got.wait(SOON_S)
    assert time.monotonic() - begin < 0.5  # at the next safe point, 1 ms away; a plain lock may take for ever
    stop.set()
    decoding.join(SOON_S)


@pytest.mark.parametrize("urgent", [False, True])
def test_an_exception_inside_gives_it_back(urgent):
    guard = SafePoint()
    with pytest.raises(KeyError), guard.hold(urgent=urgent), guard.hold():
        raise KeyError
    assert free(guard)


@pytest.mark.parametrize("urgent", [False, True])
def test_ctrl_c_while_waiting_leaves_nothing_behind(urgent):
    guard, taken, leave = SafePoint(), threading.Event(), threading.Event()

    def keep() -> None:
        with guard.hold():
            taken.set()
            leave.wait(SOON_S)

    keeper = in_thread(keep)
    assert taken.wait(SOON_S)
    main = threading.get_ident()
    in_thread(lambda: (time.sleep(0.05), signal.pthread_kill(main, signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt), guard.hold(urgent=urgent):
        pytest.fail("the other thread still has it")
    leave.set()
    keeper.join(SOON_S)
    assert guard._urgent_waiting == 0
    assert free(guard)


def test_ctrl_c_at_any_moment_never_leaves_it_taken():
    """It would be taken for ever: the governor waits for it, and closing the model for the governor."""
    guard, main, random = SafePoint(), threading.get_ident(), np.random.default_rng(0)

    def interrupt(ready: threading.Event, pause_s: float) -> None:
        ready.wait(SOON_S)
        time.sleep(pause_s)
        signal.pthread_kill(main, signal.SIGINT)

    for _ in range(80):
        ready, pause_s = threading.Event(), random.uniform(0.0, 0.001)
        sender = in_thread(lambda ready=ready, pause_s=pause_s: interrupt(ready, pause_s))
        with contextlib.suppress(KeyboardInterrupt):
            ready.set()
            while True:
                with guard.hold():
                    pass
        sender.join(SOON_S)
        assert free(guard)
