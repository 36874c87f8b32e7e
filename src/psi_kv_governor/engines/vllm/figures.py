"""What is told of an engine to whoever draws curves: plain data."""

from __future__ import annotations

import time
from collections.abc import Mapping

EVERY_S = 1.0
"""Time between two tellings."""

GAUGES = {
    "resident_bytes": "Bytes of the KV cache in memory, over all ranks",
    "parked_bytes": "Bytes of cached blocks that are in a file and not in memory",
    "standing_still": "Requests that stand still with their blocks parked",
}
COUNTERS = {
    "returned_bytes": "Bytes that the operating system got back",
    "read_back_bytes": "Bytes that were read back before they were needed",
    "written_bytes": "Bytes that were written for parking",
    "preemptions": "Requests that were made to stand still",
}


def added(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """Two tellings as one: amounts are summed, and of what stands the later one counts."""
    both = {**one, **other}
    return {name: one.get(name, 0) + other.get(name, 0) if name in COUNTERS else both[name] for name in both}


class Figures:
    """Counts since the last telling."""

    def __init__(self) -> None:
        self._counts: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._told_s = 0.0

    @property
    def due(self) -> bool:
        """Whether it is time for the next telling."""
        return time.monotonic() - self._told_s >= EVERY_S

    def count(self, **amounts: float) -> None:
        """So much more of these."""
        for name, amount in amounts.items():
            if amount:
                self._counts[name] = self._counts.get(name, 0) + amount

    def told(self, **standing: float) -> dict[str, float]:
        """What is new since the last call; empty where nothing is."""
        self._told_s = time.monotonic()
        counts, self._counts = self._counts, {}
        if not counts and standing == self._last:
            return {}
        self._last = standing
        return {**standing, **counts}
