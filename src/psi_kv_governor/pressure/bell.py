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


class Bell:
    """Sleeps. Holds no reference to anything but its waker, so that who sleeps on it keeps nobody alive.

    `wait` and `watch` belong to one thread; `ring` and `close` to any. Where there is nothing like poll
    (Windows), only `ring` ends a sleep.
    """

    def __init__(self) -> None:
        self.lost = ""
        """Why the waker died; '' while it lives, or since `watch`."""
        self.lost_name = ""
        """Which one it was."""
        self._waker: Waker | None = None
        self._rest_until_s = 0.0
        self._rung = threading.Event()
        # Reentrant: a garbage collection inside of it may end the sensor that this bell belongs to.
        self._lock = threading.RLock()
        self._asleep = self._closed = False
        self._door: tuple[int, int] | None = _open_door()
        # Made once: so a sleep costs 77 us of processor time, as much as one on a threading.Event.
        self._alone = _poll_of(self._door)
        self._all = _poll_of(self._door)

    @property
    def waker(self) -> Waker | None:
        """What wakes it beside `ring`."""
        return self._waker

    def watch(self, waker: Waker | None) -> None:
        """Be woken by `waker` from now on, and close the one before. It is closed with the bell."""
        old, self._waker, self.lost = self._waker, waker, ""
        self._all = _poll_of(self._door, waker)
        if old is not None:
            old.close()
        if waker is not None and (self._closed or self._door is None):
            self._drop_waker()

    def wait(self, timeout_s: float) -> None:
        """Sleep `timeout_s`, or until a waker fires or dies, or somebody rings (also if just before)."""
        timeout_s = min(max(timeout_s, 0.0), _LONGEST_S)
        with self._lock:
            self._asleep = True
            door = None if self._closed else self._door
        try:
            if door is None:
                if self._rung.wait(timeout_s):
                    self._rung.clear()
            else:
                self._poll(door[0], time.monotonic() + timeout_s)
        except OSError:  # poll is refused: sleep without it from now on
            with self._lock:
                self._release()
        finally:
            with self._lock:
                self._asleep = False
                if self._closed:
                    self._release()

    def ring(self) -> None:
        """End the sleep of now, or the next one."""
        with self._lock:
            if self._door is None:
                self._rung.set()
                return
            with contextlib.suppress(BlockingIOError):  # full: it is awake more than once already
                os.write(self._door[1], b"\0")

    def close(self) -> None:
        """Give back the descriptors; who sleeps is woken first. Safe to call twice."""
        with self._lock:
            self._closed = True
            if self._asleep:
                self.ring()
            else:
                self._release()

    def _poll(self, door: int, deadline_s: float) -> None:
        while True:
            now_s = time.monotonic()
            resting = self._waker is not None and now_s < self._rest_until_s
            until_s = min(deadline_s, self._rest_until_s) if resting else deadline_s
            poll = self._alone if resting else self._all
            for descriptor, events in poll.poll(max(0, math.ceil((until_s - now_s) * 1000))):
                if descriptor == door:
                    _drain(door)
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
        door, self._door = self._door, None
        for descriptor in door or ():
            os.close(descriptor)


def _open_door() -> tuple[int, int] | None:
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


def _poll_of(door: tuple[int, int] | None, waker: Waker | None = None) -> Any:
    """What is polled; None without a door. Any, as select.poll is a function and no type."""
    if door is None:
        return None
    poll = select.poll()
    poll.register(door[0], select.POLLIN)
    if waker is not None:
        poll.register(waker.fileno(), waker.mask)
    return poll


def _drain(descriptor: int) -> None:
    with contextlib.suppress(BlockingIOError):
        while os.read(descriptor, 4096):
            pass
