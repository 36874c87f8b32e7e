"""Counters of the kernel that only grow, as rates and as signs of life."""

from __future__ import annotations

import math

_RATE_S = 0.5
"""Time over which a rate is taken: shorter, a few pages would be many a second."""

_LASTING_S = 2.0
"""A limit that was met counts as biting for so long: a cgroup that thrashes meets it many times a second, and
one that grows slowly about once in that."""


_LONGEST_REST_S = 1.0
"""A read that took long was most likely held up: the process stood still, for want of memory at that, and is
not to go by what it read for a hundred times so long. Where each read takes 20 ms of itself, one a second
is a fiftieth of the time all the same."""


def rest_s(took_s: float, share: float) -> float:
    """How long a file is left alone whose read `took_s`, so that reading it takes `share` of the time."""
    return min(took_s / share, _LONGEST_REST_S)


class Rate:
    """How fast a counter grows."""

    def __init__(self) -> None:
        self._count: int | None = None
        self._since_s = 0.0
        self.per_s = 0.0

    def add(self, now_s: float, count: int) -> None:
        """Take in the counter as it is now; one that went back is another's."""
        if self._count is None or count < self._count:
            self._count, self._since_s, self.per_s = count, now_s, 0.0
        elif now_s - self._since_s >= _RATE_S:
            self.per_s = (count - self._count) / (now_s - self._since_s)
            self._count, self._since_s = count, now_s


class Biting:
    """Whether a counter has grown in the last moments."""

    def __init__(self) -> None:
        self._count: int | None = None
        self._grew_s = -math.inf

    def add(self, now_s: float, count: int | None) -> bool | None:
        """Take in the counter as it is now; None where it is not told, or was never told before."""
        before, self._count = self._count, count
        if count is None or before is None:
            return None
        if count > before:
            self._grew_s = now_s
        return now_s - self._grew_s < _LASTING_S
