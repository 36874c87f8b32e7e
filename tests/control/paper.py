"""A machine on paper for scenarios of the law: one memory without swap, neighbours, and governed caches."""

from __future__ import annotations

import math
from collections.abc import Callable

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import Action, CacheSnapshot, LawState, decide, pause_s
from psi_kv_governor.pressure.reading import MACHINE, Level, Neighbour, Reading

MIB = 1 << 20
GIB = 1 << 30
GB = 10**9
SLICE_BYTES = 8 * MIB
STEP_S = 0.01


class Governed:
    """A process with a cache, of which a fifth is the floor, and its governor."""

    def __init__(
        self, name: str, cache_bytes: int, jitter: float = 0.0, config: GovernorConfig | None = None
    ) -> None:
        self.name = name
        self.config = config or GovernorConfig()
        self.live_bytes, self.masked_bytes = cache_bytes, 0
        self.floor_bytes = cache_bytes // 5
        self.last_used_s = 0.0
        self.state = LawState(jitter=jitter)
        self.next_s = self.last_s = 0.0
        self.acts: list[tuple[float, Action, int]] = []
        self._said: tuple[tuple[float, ...], Neighbour] | None = None

    def snapshot(self) -> CacheSnapshot:
        return CacheSnapshot(
            live_bytes=self.live_bytes,
            masked_bytes=self.masked_bytes,
            lost_bytes=0,
            trimmable_bytes=max(0, self.live_bytes - self.floor_bytes),
            lossless_bytes=0,
            step_bytes=MIB,
            last_used_s=self.last_used_s,
        )

    def turn(self, reading: Reading) -> None:
        decision, self.state = decide(self.config, self.state, reading, self.snapshot())
        n_bytes = decision.n_bytes
        if decision.action is Action.RESTORE:
            n_bytes = min(n_bytes, SLICE_BYTES, self.masked_bytes)
            self.live_bytes, self.masked_bytes = self.live_bytes + n_bytes, self.masked_bytes - n_bytes
        elif decision.action is Action.TRIM:
            self.live_bytes, self.masked_bytes = self.live_bytes - n_bytes, self.masked_bytes + n_bytes
        if decision.action is not Action.NONE:
            self.acts.append((reading.time_s, decision.action, n_bytes))
        self.next_s = reading.time_s + max(STEP_S, pause_s(self.config, reading, self.state))

    def count(self, action: Action) -> int:
        """How often it did so; slices of one restore are one."""
        times = [time_s for time_s, done, _ in self.acts if done is action]
        return sum(b - a > 0.5 for a, b in zip([-math.inf, *times], times, strict=False))

    def neighbour(self) -> Neighbour:
        """What it says of itself, made anew when it is no longer so: each of many asks all others."""
        now = self.live_bytes, self.masked_bytes, self.state.run_bytes, self.last_used_s
        if self._said is None or self._said[0] != now:
            self._said = now, self._neighbour()
        return self._said[1]

    def _neighbour(self) -> Neighbour:
        return Neighbour(
            id=self.name,
            levels=(MACHINE,),
            last_used_s=self.last_used_s,
            trimmable_bytes=self.snapshot().trimmable_bytes,
            masked_bytes=self.masked_bytes,
            restoring=self.state.run_bytes > 0,
            claim_bytes=self.state.run_bytes,
            resident_bytes=self.live_bytes,
        )


class Paper:
    """Adds up what is wanted; killed is whoever is there when it is more than there is."""

    def __init__(
        self, total_bytes: int, others: Callable[[float], int], caches: list[Governed], *, known: bool = True
    ) -> None:
        self.total_bytes = total_bytes
        self.others = others
        self.caches = caches
        self.known = known
        """Whether the governors know of each other."""
        self.least_bytes = total_bytes
        self.killed_s: float | None = None

    def run(self, seconds: float, stall: Callable[[float], float] = lambda _: 0.0) -> None:
        """`stall` gives the share of the tenth of a second that ends then."""
        for step in range(round(seconds / STEP_S)):
            time_s = step * STEP_S
            left = self._left_bytes(time_s)
            for one in self.caches:
                if left < 0:
                    self.killed_s = time_s
                    return
                if time_s >= one.next_s - 1e-9:
                    self._turn(one, time_s, left, stall)
                    left = self._left_bytes(time_s)

    def _left_bytes(self, time_s: float) -> int:
        left = self.total_bytes - self.others(time_s) - sum(one.live_bytes for one in self.caches)
        self.least_bytes = min(self.least_bytes, left)
        return left

    def _turn(self, one: Governed, time_s: float, left: int, stall: Callable[[float], float]) -> None:
        windows = max(1, round((time_s - one.last_s) / 0.1))
        one.last_s = time_s
        level = Level(
            name=MACHINE,
            some=sum(stall(max(0.0, time_s - 0.1 * i)) for i in range(windows)) / windows,
            full=0.0,
            headroom_bytes=left,
            limit_bytes=self.total_bytes,
        )
        near = [other.neighbour() for other in self.caches if other is not one] if self.known else []
        one.turn(
            Reading(
                time_s=time_s,
                interval_s=0.1 * windows,
                levels=(level,),
                own_resident_bytes=one.live_bytes,
                neighbours=tuple(near),
            )
        )
