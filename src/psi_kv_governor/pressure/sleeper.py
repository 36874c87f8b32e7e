"""The loop's sleep, which a waker or another thread can end."""

from __future__ import annotations

import contextlib
import math
import os
import select
import threading
import time
from typing import Any

from psi_kv_governor.errors import SourceLostError
from psi_kv_governor.pressure.waker import Waker

REST_S = 0.1
"""A waker that has fired is not listened to for so long: whatever it does (a trigger that fires again,
somebody who never stops writing into the FIFO), it causes ten readings a second at the most, 20 us each."""

_LONGEST_S = 3600.0  # poll takes milliseconds in an int; nobody is asleep for longer without a look


class Sleeper:
    """Sleeps. Holds no reference to anything but its waker, so that who sleeps on it keeps nobody alive.

    `wait` and `watch` belong to one thread; `wake` and `close` to any. Where there is nothing like poll
    (Windows), only `wake` ends a sleep.
    """

    def __init__(self) -> None:
        self.lost = ""
        """Why the waker died; '' while it lives, or since `watch`."""
        self.lost_name = ""
        """Which one it was."""
        self._waker: Waker | None = None
        self._rest_until_s = 0.0
        self._woken = threading.Event()
        # Reentrant: a garbage collection inside of it may end the sensor that this belongs to.
        self._lock = threading.RLock()
        self._asleep = self._closed = False
        self._pipe: tuple[int, int] | None = _open_pipe()
        # Made once: so a sleep costs 77 us of processor time, as much as one on a threading.Event.
        self._alone = _poll_of(self._pipe)
        self._all = _poll_of(self._pipe)

    @property
    def waker(self) -> Waker | None:
        """What wakes it beside `wake`."""
        return self._waker

    def watch(self, waker: Waker | None) -> None:
        """Be woken by `waker` from now on, and close the one before. It is closed with this."""
        old, self._waker, self.lost = self._waker, waker, ""
        self._all = _poll_of(self._pipe, waker)
        if old is not None:
            old.close()
        if waker is not None and (self._closed or self._pipe is None):
            self._drop_waker()

    def wait(self, timeout_s: float) -> None:
        """Sleep `timeout_s`, or until a waker fires or dies, or `wake` is called (also if just before)."""
        timeout_s = min(max(timeout_s, 0.0), _LONGEST_S)
        with self._lock:
            self._asleep = True
            pipe = None if self._closed else self._pipe
        try:
            if pipe is None:
                if self._woken.wait(timeout_s):
                    self._woken.clear()
            else:
                self._poll(pipe[0], time.monotonic() + timeout_s)
        except OSError:  # poll is refused: sleep without it from now on
            with self._lock:
                self._release()
        finally:
            with self._lock:
                self._asleep = False
                if self._closed:
                    self._release()

    def wake(self) -> None:
        """End the sleep of now, or the next one."""
        with self._lock:
            if self._pipe is None:
                self._woken.set()
                return
            with contextlib.suppress(BlockingIOError):  # full: it is awake more than once already
                os.write(self._pipe[1], b"\0")

    def close(self) -> None:
        """Give back the descriptors; who sleeps is woken first. Safe to call twice."""
        with self._lock:
            self._closed = True
            if self._asleep:
                self.wake()
            else:
                self._release()

    def _poll(self, pipe: int, deadline_s: float) -> None:
        while True:
            now_s = time.monotonic()
            resting = self._waker is not None and now_s < self._rest_until_s
            until_s = min(deadline_s, self._rest_until_s) if resting else deadline_s
            poll = self._alone if resting else self._all
            for descriptor, events in poll.poll(max(0, math.ceil((until_s - now_s) * 1000))):
                if descriptor == pipe:
                    _drain(pipe)
                    return
                if self._answer(events):
                    return
            if time.monotonic() >= deadline_s:
                return

    def _answer(self, events: int) -> bool:
        """Whether to wake up for what came from the waker; a false event makes it rest all the same."""
        waker = self._waker
        if waker is None:
            return False
        self._rest_until_s = time.monotonic() + REST_S
        try:
            return waker.answer(events)
        except SourceLostError as error:
            self.lost, self.lost_name = str(error), waker.name
            self._drop_waker()
            return True

    def _drop_waker(self) -> None:
        if self._waker is not None:
            self._waker.close()
            self._waker, self._all = None, self._alone

    def _release(self) -> None:
        self._drop_waker()
        pipe, self._pipe = self._pipe, None
        for descriptor in pipe or ():
            os.close(descriptor)


def _open_pipe() -> tuple[int, int] | None:
    """A pipe to be woken by; None where there is no poll to wait for it, or no descriptor to be had."""
    if not hasattr(select, "poll"):
        return None
    try:
        reading, writing = os.pipe()
    except OSError:
        return None
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    return reading, writing


def _poll_of(pipe: tuple[int, int] | None, waker: Waker | None = None) -> Any:
    """What is polled; None without a pipe. Any, as select.poll is a function and no type."""
    if pipe is None:
        return None
    poll = select.poll()
    poll.register(pipe[0], select.POLLIN)
    if waker is not None:
        poll.register(waker.fileno(), waker.mask)
    return poll


def _drain(descriptor: int) -> None:
    with contextlib.suppress(BlockingIOError):
        while os.read(descriptor, 4096):
            pass
