"""When governors were parking and restoring: stall of those times may be their own doing."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from types import TracebackType

import msgspec

from psi_kv_governor.pressure.neighbours import Neighbourhood
from psi_kv_governor.pressure.reading import Reading


class OwnWork:
    """A context manager around the work; `taken_off` tells the law how much of an interval it took.

    Parking writes and a restore takes memory: both may stall, and a stall in that time
    says nothing of others. Work may be done in several threads; it is nested, not counted twice. What
    `neighbours` do at the same time is their doing: each is told of the other's work.
    """

    def __init__(
        self, neighbours: Neighbourhood | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._neighbours = neighbours
        self._clock = clock
        self._lock = threading.Lock()
        self._running = 0
        self._begin_s = 0.0
        self._done: list[tuple[float, float]] = []

    def __enter__(self) -> None:
        with self._lock:
            if self._running == 0:
                self._begin_s = self._clock()
                self._say([*self._done, (self._begin_s, math.inf)])
            self._running += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._running -= 1
            if self._running == 0:
                self._done.append((self._begin_s, self._clock()))
                self._say(self._done)

    def _say(self, spans: list[tuple[float, float]]) -> None:
        if self._neighbours is not None:
            self._neighbours.say_work(spans)

    def taken_off(self, reading: Reading) -> Reading:
        """`reading` with the share of its interval that was own work."""
        with self._lock:
            begin_s = reading.time_s - reading.interval_s
            spans = [span for span in self._done if span[1] > begin_s]
            self._done = spans
            if self._running:
                spans = [*spans, (self._begin_s, reading.time_s)]
        spans = [*spans, *_near(reading)]
        if not spans or reading.interval_s <= 0.0:
            return reading
        overlap_s = _covered_s(spans, begin_s, reading.time_s)
        if overlap_s <= 0.0:
            return reading
        return msgspec.structs.replace(reading, own=min(1.0, overlap_s / reading.interval_s))


def _near(reading: Reading) -> list[tuple[float, float]]:
    """Work of the neighbours under the nearest limit: what they do elsewhere does not stall here."""
    if not reading.levels:
        return []
    nearest = reading.levels[0].name
    return [span for one in reading.neighbours if nearest in one.levels for span in one.work]


def _covered_s(spans: list[tuple[float, float]], begin_s: float, end_s: float) -> float:
    """How much of the time from `begin_s` to `end_s` any of `spans` covers."""
    covered_s, until_s = 0.0, begin_s
    for start, stop in sorted(spans):
        covered_s += max(0.0, min(stop, end_s) - max(start, until_s))
        until_s = max(until_s, stop)
    return covered_s
