"""Plans carried out on one engine, and the events that tell of it."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable

import msgspec

from psi_kv_governor.answers import Answers
from psi_kv_governor.bus import Bus, words
from psi_kv_governor.cache import CacheState, OneAtATime, Plan, Result, SequenceState, Snapshot, Step, Verb
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import SLICE_BYTES, Action, Decision
from psi_kv_governor.events import CacheClosed, CacheOpened, Released, Restored, Trimmed
from psi_kv_governor.own_work import OwnWork
from psi_kv_governor.parking_check import ParkingCheck
from psi_kv_governor.policy.planner import SLICE_S, Planner

_BEHIND_S = 1.0
"""Dirty pages are written so often while headroom is not plentiful: decoding makes a few MB of them in it."""
_DAY_S = 86_400.0
_LATE_SLICES = 20
"""So many slices in a row may bring nothing back because they came too late: a machine that stood still for
0.05 s had one pass. More of them, and the rest is left to the law."""


class Acting:
    """Does what the law or a person asks for, in the thread that asks. `clock` gives monotonic seconds."""

    def __init__(
        self,
        engine: OneAtATime,
        planner: Planner,
        bus: Bus,
        config: GovernorConfig,
        clock: Callable[[], float],
    ) -> None:
        self.work = OwnWork(clock=clock)
        """Replaced where others have to know of it, and in a forked child."""
        self.caches: dict[int, tuple[str, int]] = {}
        """Name and process of each cache, by its number, as of the last snapshot."""
        self._answers = Answers()
        self._engine = engine
        self._planner = planner
        self._bus = bus
        self._config = config
        self._clock = clock
        self._written: deque[tuple[float, int]] = deque()
        self._behind_s = -math.inf
        self._check = ParkingCheck()

    def collect(self) -> None:
        """Have the engine gather what the policy needs. Where it can't, it is scored by what there is."""
        policy = self._planner.policy
        try:
            self._engine.collect(policy.needs)
        except Exception as error:
            self._bus.degrade("policy", f"nothing can be collected for {policy.name}: {words(error)}")

    # -- what the law asks for --------------------------------------------------------------------------

    def carry_out(self, decision: Decision, snapshot: Snapshot) -> None:
        """Do what was decided on `snapshot`. Raises EngineError."""
        if decision.action is Action.TRIM:
            if decision.urgent or self._may_write():
                plan = self._planner.trim(snapshot, decision.n_bytes, urgent=decision.urgent)
                self._tell_trimmed(self._apply(plan), decision.reason)
        elif decision.action is Action.RESTORE:
            masked_bytes = self._planner.holdings(snapshot).masked_bytes
            result = self._apply(self._planner.restore(snapshot, decision.n_bytes))
            self._tell_restored(result, masked_bytes)
        else:
            self._keep_house(decision, snapshot)

    def _keep_house(self, decision: Decision, snapshot: Snapshot) -> None:
        """What is done while there is nothing to decide: pages of free cells, saved states, dirty pages."""
        if (plan := self._planner.release(snapshot)) is not None:
            result = self._apply(plan)
            if result.bytes_returned:
                self._bus.tell(Released(time_s=self._clock(), bytes_returned=result.bytes_returned))
        plan = self._planner.park_blobs(snapshot, kept=not decision.write_behind)
        if plan is not None and self._may_write():
            self._tell_trimmed(self._apply(plan), "saved states are parked as soon as they are whole")
        now_s = self._clock()
        if decision.write_behind and now_s - self._behind_s >= _BEHIND_S and self._may_write():
            self._behind_s = now_s
            if (plan := self._planner.write_behind(snapshot)) is not None:
                self._apply(plan)

    # -- what a person asks for -------------------------------------------------------------------------

    def trim_share(self, fraction: float) -> Result:
        """Give up this share (0 to 1) of what may go, however long it takes."""
        snapshot = self._engine.snapshot()
        n_bytes = round(fraction * self._planner.holdings(snapshot).trimmable_bytes)
        if n_bytes <= 0:
            return Result(problem=self._planner.why_nothing(snapshot))
        result = self._apply(self._planner.trim(snapshot, n_bytes))
        self._tell_trimmed(result, "by hand")
        return result

    def restore_all(self, max_bytes: int | None) -> Result:
        """Bring back (up to `max_bytes` of) what is masked, slice by slice: tokens are decoded between."""
        total, masked_bytes, late = Result(), 0, 0
        left = sys.maxsize if max_bytes is None else max_bytes
        while left > 0:
            snapshot = self._engine.snapshot()
            now_bytes = self._planner.holdings(snapshot).masked_bytes
            masked_bytes = masked_bytes or now_bytes
            if now_bytes <= 0:
                break
            result = self._apply(self._planner.restore(snapshot, left))
            total = msgspec.structs.replace(total.plus(result), done=result.done)  # the last slice tells
            left -= max(1, result.bytes_back)
            late = 0 if result.cells else late + 1
            if late and _ends(result, late):
                break
        self._tell_restored(total, masked_bytes)
        return total

    def park(self, sequence: int | None, pid: int | None) -> Result:
        """Park each sequence that is not being decoded and the saved states; or this sequence, which is read
        back at once if it is being decoded."""
        snapshot = self._engine.snapshot()
        chosen, problem = _chosen(snapshot, sequence, pid)
        idle = [(cache, one) for cache, one in chosen if sequence is not None or not one.running]
        if chosen and not idle:
            problem = "all of it is being decoded, and would be read back at once"
        steps = [Step(verb=Verb.PARK, cache=cache.id, sequence=one.id) for cache, one in idle]
        if sequence is None and (blobs := self._planner.park_blobs(snapshot)) is not None:
            there = {cache.id for cache in snapshot.caches if pid in {None, cache.pid}}
            steps += [step for step in blobs.steps if step.cache in there]
        if not self._planner.ladder(snapshot).parks:
            steps, problem = [], self._engine.describe().capabilities.park.why or "there is no place to park"
        result = self._apply(Plan(steps=tuple(steps)))
        self._tell_trimmed(result, "by hand")
        if result.bytes_returned or result.problem:
            return result
        return msgspec.structs.replace(result, problem=problem or "all of it is parked already")

    def unpark(self, sequence: int | None, pid: int | None) -> Result:
        """Read what is parked back, slice by slice, before somebody needs it. What is masked stays so."""
        total, late = Result(), 0
        while True:
            chosen, problem = _chosen(self._engine.snapshot(), sequence, pid)
            steps = tuple(
                Step(verb=Verb.UNPARK, cache=cache.id, sequence=one.id)
                for cache, one in chosen
                if one.parked_bytes
            )
            result = self._apply(Plan(steps=steps, max_bytes=SLICE_BYTES, deadline_s=SLICE_S))
            total = msgspec.structs.replace(total.plus(result), done=result.done)
            late = 0 if result.bytes_back else late + 1
            if late and _ends(result, late):
                return total if total.cells else Result(problem=problem or total.problem)

    # -- doing ------------------------------------------------------------------------------------------

    def _apply(self, plan: Plan) -> Result:
        if not plan.steps:
            return Result()
        with self.work:
            self._check.before()
            result = self._engine.apply(plan)
            why = self._check.after(result, self._engine.describe)
        if why:
            self._engine.stop_parking(why)
            self._bus.degrade("park", why)
        if result.written_bytes:
            self._written.append((self._clock(), result.written_bytes))
        if result.problem:
            self._bus.degrade("park", result.problem)
        return result

    def _may_write(self) -> bool:
        """Whether the disk may be written to today; what is urgent is not asked about."""
        now_s = self._clock()
        while self._written and now_s - self._written[0][0] > _DAY_S:
            self._written.popleft()
        most = self._config.write_limit_bytes_per_day
        if not most or sum(n_bytes for _, n_bytes in self._written) < most:
            return True
        self._bus.degrade("park", f"{most / 1e9:.0f} GB were written in a day (write_limit_bytes_per_day)")
        return False

    # -- telling ----------------------------------------------------------------------------------------

    def tell_caches(self, snapshot: Snapshot) -> None:
        """Say which caches came and went since the last snapshot, and which answers ended partly masked."""
        now = {cache.id: cache for cache in snapshot.caches}
        for number in self.caches.keys() - now.keys():
            name, _ = self.caches.pop(number)
            self._bus.tell(CacheClosed(time_s=snapshot.time_s, cache=number, name=name))
        for number in now.keys() - self.caches.keys():
            cache = now[number]
            self.caches[number] = (cache.name, cache.pid)
            self._bus.tell(CacheOpened(time_s=snapshot.time_s, cache=number, name=cache.name, pid=cache.pid))
        for answer in self._answers.ended(snapshot):
            self._bus.tell(answer)

    def _tell_trimmed(self, result: Result, reason: str) -> None:
        if not result.cells and not result.bytes_returned:
            return
        self._bus.tell(
            Trimmed(
                time_s=self._clock(),
                cells=result.cells,
                masked=result.masked,
                lost=result.lost,
                bytes_returned=result.bytes_returned,
                written_bytes=result.written_bytes,
                seconds=result.seconds,
                reason=reason,
            )
        )

    def _tell_restored(self, result: Result, masked_bytes: int) -> None:
        if not result.cells:
            return
        self._bus.tell(
            Restored(
                time_s=self._clock(),
                cells=result.cells,
                bytes_back=result.bytes_back,
                seconds=result.seconds,
                masked_bytes=max(0, masked_bytes - result.bytes_back),
            )
        )


def _ends(slice_: Result, late: int) -> bool:
    """Whether nothing more comes back after one that brought nothing, the `late`-th in a row."""
    return slice_.done or bool(slice_.problem) or late > _LATE_SLICES


def _chosen(
    snapshot: Snapshot, sequence: int | None, pid: int | None
) -> tuple[list[tuple[CacheState, SequenceState]], str]:
    """The sequences that are meant, or why there is none."""
    there = [(cache, one) for cache in snapshot.caches for one in cache.sequences if pid in {None, cache.pid}]
    chosen = [(cache, one) for cache, one in there if sequence in {None, one.id}]
    if sequence is not None and not chosen:
        known = ", ".join(str(number) for number in sorted({one.id for _, one in there})) or "none"
        return [], f"there is no sequence {sequence}: there are {known}"
    return chosen, ""
