"""A simulated machine: limits within limits, processes with their caches, and neighbours that want memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import NamedTuple, Protocol

from psi_kv_governor.pressure.reading import MACHINE, Level
from psi_kv_governor.simulation.scenario import Neighbour

RECLAIM_FROM = 0.97
"""Share of the limit in use from which the kernel reclaims in the way of those who allocate."""

STALL_SCALE = 0.06
"""Overcommitment, as a share of the limit, at which 63 % of the time is lost. A shape, not a measurement:
stall rises steeply at first, and nears 1 when the working set no longer fits."""

STALL_NOISE = 0.004
"""Most stall of a healthy machine: page faults that wait for the disk."""

JITTER = 0.0008
"""How far the neighbours' demand may stray in one step, as a share of the limit."""

RESTART_S = 30.0
"""A neighbour that was killed is started again after so long."""


class Limit(NamedTuple):
    """Something that can run short: the machine, or a cgroup."""

    limit_bytes: int
    name: str = MACHINE
    kind: str = "MemAvailable"
    """What sets it: as `Level.limit`. `memory.high` slows down and kills nobody."""
    swap_bytes: float = math.inf
    """Beyond the limit and so much more, somebody is killed. Infinite: nobody ever is."""
    stall_scale: float = STALL_SCALE
    psi: bool = True


class Guest:
    """A neighbour within one of the limits. Its demand is a share of that limit."""

    def __init__(self, neighbour: Neighbour, within: int = 0) -> None:
        self.within = within
        """Index of its limit: it counts there, and in all further out."""
        self.bytes = 0
        self._neighbour = neighbour
        self._back_s = -math.inf

    def want(self, limit: Limit, time_s: float, others_bytes: int, stray: float) -> None:
        """Take what it wants now, beside `others_bytes` of the governed processes."""
        ours = others_bytes / limit.limit_bytes
        share = self._neighbour.demand(time_s, 1.0 - ours) + stray if time_s >= self._back_s else 0.0
        self.bytes = int(max(0.0, share) * limit.limit_bytes)

    def kill(self, time_s: float) -> None:
        self.bytes, self._back_s = 0, time_s + RESTART_S


class Process(Protocol):
    """Somebody who may be killed."""

    @property
    def resident_bytes(self) -> int:
        """0 once it was killed."""

    def kill(self) -> None:
        """It is gone for good."""


class Machine:
    """Adds up what is wanted, and says how much of the time is lost and how much is left.

    `limits` go from the nearest outwards; every governed process lies in all of them. The random numbers are
    drawn by the step, whatever the caches do: a run with and one without the governor meet the same
    neighbours.
    """

    def __init__(self, limits: Sequence[Limit], guests: Sequence[Guest], random: Random) -> None:
        self.limits = limits
        self.processes: list[Process] = []
        self.time_s = 0.0
        self.stall = 0.0
        """Share of the last step that was lost, at the level that is worst off."""
        self.stall_s = 0.0
        """The sum of it."""
        self.kills = 0
        self._guests = guests
        self._random = random
        self._stray = 0.0
        self._used = [0] * len(limits)
        self._totals_s = [0.0] * len(limits)
        """Time lost so far by level: `total=` of a PSI file."""

    def advance(self, step_s: float) -> None:
        """Let `step_s` pass."""
        self.time_s = round(self.time_s + step_s, 6)  # no drift, and no long numbers in the output
        self._stray = 0.9 * self._stray + self._random.uniform(-JITTER, JITTER)
        noise = self._random.uniform(0.0, STALL_NOISE)
        ours = self._ours_bytes()
        for guest in self._guests:
            guest.want(self.limits[guest.within], self.time_s, ours, self._stray)
        worst = 0.0
        for index, limit in enumerate(self.limits):
            ours = self._kill_until_it_fits(index, limit, ours)
            stall = min(1.0, self._short(self._used[index], limit) + noise)
            self._totals_s[index] += stall * step_s
            worst = max(worst, stall)
        self.stall = worst
        self.stall_s += worst * step_s

    def headroom_bytes(self, index: int) -> int:
        """What is left at that limit."""
        return max(0, self.limits[index].limit_bytes - self._used[index])

    @property
    def headroom(self) -> float:
        """The least share of a limit that is left."""
        return min(self.headroom_bytes(i) / limit.limit_bytes for i, limit in enumerate(self.limits))

    def levels(self, before_s: Sequence[float], interval_s: float) -> tuple[tuple[Level, ...], list[float]]:
        """What a pressure source would tell now, with stall since the totals `before_s`; and the totals."""
        return tuple(
            self._level(index, limit, before_s[index], interval_s) for index, limit in enumerate(self.limits)
        ), list(self._totals_s)

    def _level(self, index: int, limit: Limit, before_s: float, interval_s: float) -> Level:
        some = min(1.0, (self._totals_s[index] - before_s) / interval_s) if interval_s > 0.0 else 0.0
        over_bytes = max(0, self._used[index] - limit.limit_bytes)
        return Level(
            name=limit.name,
            some=some if limit.psi else None,
            full=some * some if limit.psi else None,  # of two tasks that stall alike and independently
            headroom_bytes=self.headroom_bytes(index),
            limit_bytes=limit.limit_bytes,
            limit=limit.kind,
            bites=None if limit.name == MACHINE else self._used[index] > RECLAIM_FROM * limit.limit_bytes,
            swap_bytes=None if math.isinf(limit.swap_bytes) else max(0, int(limit.swap_bytes) - over_bytes),
        )

    @staticmethod
    def _short(used_bytes: int, limit: Limit) -> float:
        over = used_bytes / limit.limit_bytes - RECLAIM_FROM
        return 1.0 - math.exp(-over / limit.stall_scale) if over > 0.0 else 0.0

    def _ours_bytes(self) -> int:
        return sum(process.resident_bytes for process in self.processes)

    def _kill_until_it_fits(self, index: int, limit: Limit, ours_bytes: int) -> int:
        """The kernel kills the largest first. Gives what the processes take then."""
        while True:
            used_bytes = ours_bytes
            for guest in self._guests:
                if guest.within <= index:
                    used_bytes += guest.bytes
            self._used[index] = used_bytes
            if limit.kind == "memory.high" or used_bytes <= limit.limit_bytes + limit.swap_bytes:
                return ours_bytes
            self._kill_largest(index)
            ours_bytes = self._ours_bytes()

    def _kill_largest(self, index: int) -> None:
        self.kills += 1
        inside = [guest for guest in self._guests if guest.within <= index]
        guest = max(inside, key=lambda one: one.bytes, default=None)
        process = max(self.processes, key=lambda one: one.resident_bytes, default=None)
        if guest is not None and (process is None or guest.bytes > process.resident_bytes):
            guest.kill(self.time_s)
        elif process is not None:
            process.kill()
