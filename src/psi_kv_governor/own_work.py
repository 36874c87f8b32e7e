"""When the governor itself was spilling and restoring: stall of those times may be its own doing."""

from __future__ import annotations

import threading
import time
from types import TracebackType

import msgspec

from psi_kv_governor.pressure.reading import Reading


class OwnWork:
    """A context manager around the work; `taken_off` tells the law how much of an interval it took.

    A spill writes past the page cache and a restore takes memory: both may stall, and a stall in that time
    says nothing of the neighbours. Work may be done in several threads; it is nested, not counted twice.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._begin_s = 0.0
        self._done: list[tuple[float, float]] = []

    def __enter__(self) -> None:
        with self._lock:
            if self._running == 0:
                self._begin_s = time.monotonic()
            self._running += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._running -= 1
            if self._running == 0:
                self._done.append((self._begin_s, time.monotonic()))

    def taken_off(self, reading: Reading) -> Reading:
        """`reading` with the share of its interval that was own work."""
        with self._lock:
            begin_s = reading.time_s - reading.interval_s
            spans = [span for span in self._done if span[1] > begin_s]
            self._done = spans
            if self._running:
                spans = [*spans, (self._begin_s, reading.time_s)]
        if not spans or reading.interval_s <= 0.0:
            return reading
        overlap_s = sum(max(0.0, min(stop, reading.time_s) - max(start, begin_s)) for start, stop in spans)
        if overlap_s <= 0.0:
            return reading
        return msgspec.structs.replace(reading, own=min(1.0, overlap_s / reading.interval_s))
