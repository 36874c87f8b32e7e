"""A machine on paper: one memory limit, a model with its cache, and a neighbour."""

from __future__ import annotations

import math
from random import Random

from psi_kv_governor.pressure.reading import Reading
from psi_kv_governor.simulation.scenario import Neighbour

BASE_SHARE = 0.25
"""What the model and the runtime take of the limit, whatever the cache does."""

CACHE_SHARE = 0.35
"""What the full cache takes of the limit: a long context on a small board."""

RECLAIM_FROM = 0.97
"""Share of the limit in use from which the kernel reclaims in the way of those who allocate."""

STALL_SCALE = 0.06
"""Overcommitment, as a share of the limit, at which 63 % of the time is lost. A shape, not a measurement:
stall rises steeply at first, and nears 1 when the working set no longer fits."""

STALL_NOISE = 0.004
"""Most stall of a healthy machine: page faults that wait for the disk."""

JITTER = 0.0008
"""How far the neighbour's demand may stray in one step, as a share of the limit."""


class Machine:
    """Adds up what is wanted, and says how much of the time is lost and how much is left.

    The random numbers are drawn by the step, whatever the cache does: a run with and one without the
    governor meet the same neighbour.
    """

    def __init__(self, limit_bytes: int, neighbour: Neighbour, random: Random) -> None:
        self.limit_bytes = limit_bytes
        self.time_s = 0.0
        self.stall = 0.0
        """Share of the last step that was lost."""
        self.stall_s = 0.0
        """Time lost so far: `total=` of a PSI file."""
        self.headroom_bytes = limit_bytes
        self._neighbour = neighbour
        self._random = random
        self._jitter = 0.0
        self._own_bytes = 0
        self._read_s: float | None = None
        self._read_stall_s = 0.0

    def advance(self, step_s: float, cache_bytes: int) -> None:
        """Let `step_s` pass with a cache of `cache_bytes`."""
        self.time_s = round(self.time_s + step_s, 6)  # no drift, and no long numbers in the output
        ours = BASE_SHARE + cache_bytes / self.limit_bytes
        self._own_bytes = int(ours * self.limit_bytes)
        self._jitter = 0.9 * self._jitter + self._random.uniform(-JITTER, JITTER)
        wanted = self._neighbour.demand(self.time_s, 1.0 - ours) + self._jitter
        used = ours + max(0.0, wanted)
        self.headroom_bytes = int(self.limit_bytes * max(0.0, 1.0 - used))
        short = 1.0 - math.exp(-max(0.0, used - RECLAIM_FROM) / STALL_SCALE)
        self.stall = min(1.0, short + self._random.uniform(0.0, STALL_NOISE))
        self.stall_s += self.stall * step_s

    @property
    def headroom(self) -> float:
        """What is left, as a share of the limit."""
        return self.headroom_bytes / self.limit_bytes

    def read(self) -> Reading:
        """What a pressure source would say now: stall since the last reading, as a delta of the total."""
        interval_s = 0.0 if self._read_s is None else self.time_s - self._read_s
        lost_s = self.stall_s - self._read_stall_s
        some = min(1.0, lost_s / interval_s) if interval_s > 0.0 else 0.0
        self._read_s, self._read_stall_s = self.time_s, self.stall_s
        return Reading(
            time_s=self.time_s,
            interval_s=interval_s,
            some=some,
            full=some * some,  # of two tasks that stall alike and independently, both do
            headroom_bytes=self.headroom_bytes,
            limit_bytes=self.limit_bytes,
            own_resident_bytes=self._own_bytes,
            source="simulated machine",
        )
