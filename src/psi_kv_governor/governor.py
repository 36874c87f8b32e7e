"""The loop that wires the rooms: a reading to the law, its decision to the planner, a plan to the engine."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import msgspec

from psi_kv_governor.bus import Bus, Subscribers
from psi_kv_governor.cache import Engine, Plan, Range, Result, Snapshot, Step, Verb
from psi_kv_governor.config import GovernorConfig, load_config
from psi_kv_governor.control import (
    SLICE_BYTES,
    Action,
    CacheSnapshot,
    Decision,
    LawState,
    Mode,
    Turn,
    decide,
    pause_s,
    spare_bytes,
)
from psi_kv_governor.errors import BadInputError, EngineError
from psi_kv_governor.events import (
    CacheClosed,
    CacheOpened,
    Event,
    ModeChanged,
    Recomputed,
    Released,
    Restored,
    Trimmed,
)
from psi_kv_governor.lifetime import open_governors, run
from psi_kv_governor.own_work import OwnWork
from psi_kv_governor.policy import Policy, get_policy
from psi_kv_governor.policy.planner import Planner
from psi_kv_governor.pressure.reading import PressureSource, Reading
from psi_kv_governor.refusing import Refusing
from psi_kv_governor.sensor import Sensor
from psi_kv_governor.status import Status
from psi_kv_governor.status_socket import StatusSocket

_T = TypeVar("_T")
_cache_limit: float | None = None

_CALM_TURN_S = 1.0
"""Longest between two turns of the whole loop while nothing happens."""
_BEHIND_S = 1.0
"""Dirty pages are written so often while headroom is not plentiful: decoding makes a few MB of them in it."""
_DAY_S = 86_400.0


def psi_set_cache_limit(share: float | None) -> None:
    """From now on, while the machine is under pressure, every governed cache of this process holds at most
    this `share` (0 to 1) of its cells. None lifts the limit. Raises BadInputError."""
    if share is not None and not 0.0 <= share <= 1.0:
        raise BadInputError(f"a cache limit of {share} is not usable: give a share from 0 to 1, or None")
    global _cache_limit  # noqa: PLW0603  # the one-line form is process wide by definition
    _cache_limit = share


def _positions(start: int, stop: int) -> Range:
    if not 0 <= start < stop:
        raise BadInputError(f"positions {start} to {stop} are not usable: give 0 <= start < stop")
    return Range(start, stop)


class Governor:
    """Watches the machine and trims and restores the caches of one engine.

    Acts by itself from `start` to `close`, in one thread; `step` is one turn of that loop. A failure in it
    never reaches the model: it is said once, as a Degraded event and in the log, and the loop goes on with
    what still works. Raises BadInputError for a policy that can't be used.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        source: PressureSource | None = None,
        policy: Policy | None = None,
        config: GovernorConfig | None = None,
        name: str = "",
    ) -> None:
        """Without a `source` the best of this machine is found; `policy` comes from `config`. `name` is what
        others call it (`psi-kv watch`)."""
        self.config = config or load_config()
        self.engine = engine
        self.name = name
        self._bus = Bus()
        self._turns: Subscribers[Turn] = Subscribers()
        self._planner = Planner(
            policy or get_policy(self.config.policy),
            engine,
            self.config,
            complain=lambda why: self._bus.degrade("policy", why),
        )
        engine.collect(self._planner.policy.needs)
        self._refusing = Refusing(engine)
        self._reading = Reading(time_s=time.monotonic(), interval_s=0.0)
        self._reason = ""
        self._state = LawState()
        self._limit: float | None = None
        self._written: deque[tuple[float, int]] = deque()
        self._behind_s = 0.0
        self._caches: dict[int, str] = {}
        self._stop = threading.Event()
        self._forked = False
        self._thread: threading.Thread | None = None
        # Plans are carried out by the loop's thread and by this one, never by the caller's: no Ctrl-C can
        # split them, nor leave the lock closed.
        self._hand = ThreadPoolExecutor(max_workers=1, thread_name_prefix="psi-kv-hand")
        self._hand_ident: int | None = None
        self._applying = threading.Lock()
        self._sensor = Sensor(source, self._bus)
        self.work = OwnWork(self._sensor.neighbours)
        self._socket = StatusSocket(self)
        open_governors.add(self)

    # -- by hand ----------------------------------------------------------------------------------------

    def status(self) -> Status:
        """How things stand now. Raises nothing: of an engine that is gone no caches are told."""
        try:
            snapshot = self.engine.snapshot()
        except EngineError:
            snapshot = Snapshot(time_s=time.monotonic())
        description = self.engine.describe()
        return Status.of(
            snapshot,
            description,
            name=self.name,
            mode=self._state.mode,
            reason=self._reason,
            source=self._sensor.name,
            reading=self._reading,
            limit=self._limit if self._limit is not None else _cache_limit,
        )

    def trim(self, fraction: float = 0.5) -> Result:
        """Give up `fraction` (0 to 1) of what may go, now. Raises BadInputError, EngineError."""
        if not 0.0 <= fraction <= 1.0:
            raise BadInputError(f"a fraction of {fraction} is not usable: give a share from 0 to 1")
        return self._undisturbed(lambda: self._trim_share(fraction))

    def _trim_share(self, fraction: float) -> Result:
        snapshot = self.engine.snapshot()
        n_bytes = round(fraction * self._planner.holdings(snapshot).trimmable_bytes)
        if n_bytes <= 0 and fraction > 0.0:
            return Result(problem=self._planner.why_nothing(snapshot) or "nothing is left to give")
        return self._trim(snapshot, n_bytes, "by hand")

    def restore(self, max_bytes: int | None = None) -> Result:
        """Bring back (up to `max_bytes` of) what is masked, slice by slice. Raises EngineError."""
        return self._undisturbed(lambda: self._restore_all(max_bytes))

    def _restore_all(self, max_bytes: int | None) -> Result:
        total = Result()
        left = sys.maxsize if max_bytes is None else max_bytes
        while left > 0:
            snapshot = self.engine.snapshot()
            if self._planner.holdings(snapshot).masked_bytes <= 0:
                break
            result = self._apply(self._planner.restore(snapshot, min(left, SLICE_BYTES)))
            total = _sum(total, result)
            if not result.cells:
                break
            left -= max(1, result.bytes_back)
        if total.cells:
            self._tell_restored(total)
        return total

    def park(self, sequence: int | None = None) -> Result:
        """Park every sequence that is not being decoded, or this one; and the saved states. No fidelity is
        lost: who decodes it reads it back. Raises EngineError."""
        return self._undisturbed(lambda: self._for_each(Verb.PARK, sequence))

    def unpark(self, sequence: int | None = None) -> Result:
        """Read back what is parked before somebody needs it. Raises EngineError."""
        return self._undisturbed(lambda: self._for_each(Verb.UNPARK, sequence))

    def _for_each(self, verb: Verb, sequence: int | None) -> Result:
        snapshot = self.engine.snapshot()
        steps = [
            Step(verb=verb, cache=cache.id, sequence=one.id)
            for cache in snapshot.caches
            for one in cache.sequences
            if sequence == one.id or (sequence is None and not (verb is Verb.PARK and one.running))
        ]
        plan = self._planner.park_blobs(snapshot) if verb is Verb.PARK and sequence is None else None
        steps += plan.steps if plan is not None else ()
        result = self._apply(Plan(steps=tuple(steps)))
        if verb is Verb.PARK:
            self._tell_trimmed(result, "by hand")
        return result

    def limit(self, share: float | None) -> None:
        """As `psi_set_cache_limit`, for this governor's caches alone. Raises BadInputError."""
        if share is not None and not 0.0 <= share <= 1.0:
            raise BadInputError(f"a cache limit of {share} is not usable: give a share from 0 to 1, or None")
        self._limit = share

    def protect(self, start: int, stop: int, sequence: int | None = None) -> None:
        """Never mask the positions `start` to `stop` (exclusive) of `sequence` (default each), until
        `unprotect`.

        They are positions, not tokens: they can be marked before they are decoded, and stay marked whatever
        is decoded there. Raises BadInputError.
        """
        self._planner.protect(_positions(start, stop), sequence)

    def unprotect(self, start: int = 0, stop: int | None = None, sequence: int | None = None) -> None:
        """Take the protection off the positions `start` to `stop` (default all). Raises BadInputError."""
        self._planner.unprotect(_positions(start, sys.maxsize if stop is None else stop), sequence)

    def subscribe(self, subscriber: Callable[[Event], None]) -> Callable[[], None]:
        """Call `subscriber` with every event, in the thread where it happens; gives a function to end it."""
        return self._bus.subscribe(subscriber)

    def observe(self, observer: Callable[[Turn], None]) -> Callable[[], None]:
        """Call `observer` with every turn of the loop, before it acts; gives a function to end it."""
        return self._turns.subscribe(observer)

    def has_room(self) -> bool:
        """Whether there is no pressure now, and headroom above the low line."""
        if self._stop.is_set():
            return True  # closed: what it saw last is no reason to hold anything back for ever
        mode, quiet = self._state.mode, self._state.quiet_since_s is not None
        if mode is Mode.TRIMMING or (mode is Mode.HOLDING and not quiet):
            return False
        spare = spare_bytes(self.config, self._reading)
        return spare is None or spare > 0

    def recomputed(self, cells: int, seconds: float) -> None:
        """The engine's owner decoded tokens again."""
        self._bus.tell(Recomputed(time_s=time.monotonic(), cells=cells, seconds=seconds))

    def _undisturbed(self, action: Callable[[], _T]) -> _T:
        if self._stop.is_set() or threading.get_ident() == self._hand_ident:
            return action()  # closed, or a subscriber that acts: it would wait for itself

        def in_hand() -> _T:
            self._hand_ident = threading.get_ident()
            return action()

        return self._hand.submit(in_hand).result()

    # -- the loop ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Act by itself from now on. Calling it again changes nothing."""
        if self._thread is None and not self._stop.is_set():
            # The thread knows the governor weakly: a model that is dropped without close() goes all the same.
            self._thread = threading.Thread(
                target=run,
                args=(weakref.ref(self), self._sensor.bell, self._stop),
                name="psi-kv-governor",
                daemon=True,
            )
            self._thread.start()
            if self.config.status_socket:
                self._socket.start()

    def step(self) -> float:
        """One turn: read, decide, act. Gives the seconds until the next."""
        reading = self._sensor.read()
        if reading is not None:
            self._reading = reading = self.work.taken_off(reading)
            if not self._nothing_new(reading):
                try:
                    self._act(reading)
                except EngineError as error:
                    self._bus.degrade("engine", str(error))
        return pause_s(self.config, self._reading, self._state)

    def _nothing_new(self, reading: Reading) -> bool:
        """Calm before and calm now: the law is asked once a second then. A whole turn takes 0.4 ms of a
        processor whose caches others have filled meanwhile, a look alone 0.1 ms."""
        return (
            self._state.mode is Mode.CALM
            and reading.time_s - self._state.time_s < _CALM_TURN_S
            and reading.some < self.config.low
            and pause_s(self.config, reading) >= self.config.poll_s / 2
        )

    def _act(self, reading: Reading) -> None:
        old = self._state.mode
        snapshot = self.engine.snapshot()
        self._tell_caches(snapshot)
        cache = self._planner.holdings(snapshot)
        limit = self._limit if self._limit is not None else _cache_limit
        decision, self._state = decide(self.config, self._state, reading, cache, limit)
        self._reason = decision.reason
        self._turns.tell(Turn(reading=reading, cache=cache, cache_limit=limit, decision=decision))
        if decision.mode is not old:
            self._bus.tell(
                ModeChanged(time_s=reading.time_s, old=old, new=decision.mode, reason=decision.reason)
            )
        self._carry_out(decision, snapshot, cache)
        pressed = decision.mode in {Mode.TRIMMING, Mode.HOLDING} and self._state.quiet_since_s is None
        self._refusing.turn(snapshot, pressed=pressed)
        self._sensor.tell_neighbours(cache, self._state)

    def _carry_out(self, decision: Decision, snapshot: Snapshot, cache: CacheSnapshot) -> None:
        if decision.action is Action.TRIM:
            self._trim(snapshot, decision.n_bytes, decision.reason, urgent=decision.urgent)
        elif decision.action is Action.RESTORE:
            result = self._apply(self._planner.restore(snapshot, decision.n_bytes))
            if result.cells:
                self._tell_restored(result, cache.masked_bytes)
        else:
            self._housekeeping(decision, snapshot)

    def _housekeeping(self, decision: Decision, snapshot: Snapshot) -> None:
        """What is done while there is nothing to decide: pages of free cells, saved states, dirty pages."""
        if (plan := self._planner.release(snapshot)) is not None:
            result = self._apply(plan)
            if result.bytes_returned:
                self._bus.tell(Released(time_s=time.monotonic(), bytes_returned=result.bytes_returned))
        if (plan := self._planner.park_blobs(snapshot)) is not None and self._may_write():
            self._tell_trimmed(self._apply(plan), "saved states are parked as soon as they are whole")
        now_s = time.monotonic()
        if decision.write_behind and now_s - self._behind_s >= _BEHIND_S and self._may_write():
            self._behind_s = now_s
            if (plan := self._planner.write_behind(snapshot)) is not None:
                self._apply(plan)

    def _trim(self, snapshot: Snapshot, n_bytes: int, reason: str, *, urgent: bool = False) -> Result:
        if not urgent and not self._may_write():
            return Result(problem="as much was written today as write_limit_bytes_per_day allows")
        result = self._apply(self._planner.trim(snapshot, n_bytes, urgent=urgent))
        self._tell_trimmed(result, reason)
        return result

    def _apply(self, plan: Plan) -> Result:
        with self._applying, self.work:
            result = self.engine.apply(plan)
        if result.written_bytes:
            self._written.append((time.monotonic(), result.written_bytes))
        if result.problem:
            self._bus.degrade("park", result.problem)
        return result

    def _may_write(self) -> bool:
        """Whether the disk may be written to today; what is urgent is not asked about."""
        now_s = time.monotonic()
        while self._written and now_s - self._written[0][0] > _DAY_S:
            self._written.popleft()
        most = self.config.write_limit_bytes_per_day
        if not most or sum(n_bytes for _, n_bytes in self._written) < most:
            return True
        self._bus.degrade("park", f"{most / 1e9:.0f} GB were written in a day (write_limit_bytes_per_day)")
        return False

    # -- telling ----------------------------------------------------------------------------------------

    def _tell_trimmed(self, result: Result, reason: str) -> None:
        if not result.cells and not result.bytes_returned:
            return
        self._bus.tell(
            Trimmed(
                time_s=time.monotonic(),
                cells=result.cells,
                masked=result.masked,
                bytes_returned=result.bytes_returned,
                written_bytes=result.written_bytes,
                seconds=result.seconds,
                reason=reason,
            )
        )

    def _tell_restored(self, result: Result, masked_bytes: int = 0) -> None:
        self._bus.tell(
            Restored(
                time_s=time.monotonic(),
                cells=result.cells,
                bytes_back=result.bytes_back,
                seconds=result.seconds,
                masked_bytes=max(0, masked_bytes - result.bytes_back),
            )
        )

    def _tell_caches(self, snapshot: Snapshot) -> None:
        now = {cache.id: cache for cache in snapshot.caches}
        for number in self._caches.keys() - now.keys():
            self._bus.tell(CacheClosed(time_s=snapshot.time_s, cache=number, name=self._caches.pop(number)))
        for number in now.keys() - self._caches.keys():
            cache = now[number]
            self._caches[number] = cache.name
            self._bus.tell(CacheOpened(time_s=snapshot.time_s, cache=number, name=cache.name, pid=cache.pid))

    # -- the end ----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop the loop. Safe to call twice. The engine is its owner's to close."""
        if self._forked:
            return
        self._stop.set()
        self._sensor.interrupt()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._socket.close()
        self._hand.shutdown(wait=threading.get_ident() != self._hand_ident)
        self._sensor.close()

    def after_fork(self) -> None:
        """In a forked child: threads did not come along, and locks may be held for ever by those that had
        them. The child's copy of the cache is its own, ungoverned."""
        self._forked = True
        self._stop.set()
        self._thread = None
        self._applying = threading.Lock()
        self.work = OwnWork()

    def __enter__(self) -> Governor:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _sum(one: Result, other: Result) -> Result:
    return msgspec.structs.replace(
        one,
        bytes_back=one.bytes_back + other.bytes_back,
        cells=one.cells + other.cells,
        seconds=one.seconds + other.seconds,
        problem=one.problem or other.problem,
    )
