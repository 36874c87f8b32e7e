"""The loop that wires the rooms: reading to law, decision to planner, plan to engine."""

from __future__ import annotations

import logging
import random
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import TypeVar

from psi_kv_governor.acting import Acting
from psi_kv_governor.bus import Bus, Subscribers, words
from psi_kv_governor.cache import Description, Engine, OneAtATime, Range, Result, Snapshot
from psi_kv_governor.calm import Calm
from psi_kv_governor.config import GovernorConfig, load_config
from psi_kv_governor.control import LawState, Mode, Turn, decide, has_room, pause_s
from psi_kv_governor.errors import BadInputError, EngineError
from psi_kv_governor.events import Event, ModeChanged, Recomputed
from psi_kv_governor.lifetime import Ended, open_governors, started
from psi_kv_governor.limits import Limit
from psi_kv_governor.own_work import OwnWork
from psi_kv_governor.policy import Policy, get_policy
from psi_kv_governor.policy.planner import Planner
from psi_kv_governor.pressure.neighbours import Neighbourhood
from psi_kv_governor.pressure.processes import holders
from psi_kv_governor.pressure.reading import PressureSource, Reading
from psi_kv_governor.recalling import Recalling
from psi_kv_governor.refusing import Refusing
from psi_kv_governor.results import Results
from psi_kv_governor.sensor import Sensor
from psi_kv_governor.status import Status
from psi_kv_governor.status_socket import StatusSocket
from psi_kv_governor.worker import Worker

_log = logging.getLogger("psi_kv_governor")
_T = TypeVar("_T")

_FAILED_S = 1.0
"""Pause after a turn that failed: the next one fails most likely too."""
_THREADS = 2
"""Threads for what is asked by hand: a look at the status does not wait for a long restore."""


class Governor(Results):
    """Watches the machine and trims and restores the caches of one engine.

    Acts by itself from `start` to `close`, in one thread; `step` is one turn of that loop. A failure in it
    never reaches the model: it is said once, as a Degraded event and in the log, and the loop goes on. It
    ends by itself when the engine is gone. Raises BadInputError for a policy that is not known.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        source: PressureSource | None = None,
        policy: Policy | None = None,
        config: GovernorConfig | None = None,
        name: str = "",
        clock: Callable[[], float] = time.monotonic,
        jitter: float | None = None,
        neighbours: Neighbourhood | None = None,
    ) -> None:
        """Without a `source` the best of this machine is found; `policy` comes from `config`.

        `name` is what others call it (`psi-kv watch`). A simulation brings its own `clock` (monotonic
        seconds), `jitter` (0 to 1, else chance) and `neighbours`.
        """
        self.config = config or load_config()
        self.engine = engine
        self.name = name
        self.healers = []
        policy = policy or get_policy(self.config.policy)
        self._clock = clock
        self._bus = bus = Bus(clock)
        self._turns: Subscribers[Turn] = Subscribers()
        self._engine = OneAtATime(engine)
        self._planner = Planner(
            policy, self._engine, self.config, complain=lambda why: bus.degrade("policy", why)
        )
        self._acting = Acting(self._engine, self._planner, bus, self.config, clock)
        self._reading = Reading(time_s=clock(), interval_s=0.0)
        self._refusing = Refusing(engine)
        self._recalling = Recalling(engine, self._planner, self.config)
        self._reason = ""
        self._state = LawState(jitter=random.random() if jitter is None else jitter)
        self._limit = Limit()
        self._ended = Ended()
        self._closing = threading.Lock()
        self._forked = False
        self._thread: threading.Thread | None = None
        self._sensor = Sensor(source, bus, neighbours, holders(self._acting.caches))
        self._calm = Calm(self.config, self._sensor)
        self._acting.work = OwnWork(self._sensor.neighbours, clock)
        self._socket = StatusSocket(self)
        # The engine is called by the loop's thread and by these, never by the caller's.
        self._worker = Worker("psi-kv-by-hand", _THREADS)
        open_governors.add(self)
        self._undisturbed(self._acting.collect)
        self._undisturbed(self._recalling.now)

    @property
    def work(self) -> OwnWork:
        """When it was parking and restoring."""
        return self._acting.work

    # -- by hand ----------------------------------------------------------------------------------------

    def status(self) -> Status:
        """How things stand now. Raises nothing: of an engine that is gone no caches are told."""
        snapshot, description = self._undisturbed(self._look)
        return Status.of(
            snapshot,
            description,
            name=self.name,
            mode=self._state.mode,
            reason=self._reason,
            source=self._sensor.name,
            reading=self._reading,
            limit=self._limit.share,
            limit_bytes=self._limit.n_bytes,
            recall=self._undisturbed(self._recalling.done),
        )

    def _look(self) -> tuple[Snapshot, Description]:
        description = self._engine.describe()
        try:
            return self._engine.snapshot(), description
        except Exception as error:
            _log.debug("no snapshot for the status: %s", words(error))
            return Snapshot(time_s=self._clock()), description

    def trim(self, fraction: float = 0.5) -> Result:
        """Give up `fraction` (0 to 1) of what may go, now. Raises BadInputError, EngineError."""
        if not 0.0 <= fraction <= 1.0:
            raise BadInputError(f"a fraction of {fraction} is not usable: give a share from 0 to 1")
        self._undisturbed(self._recalling.now)
        return self._undisturbed(lambda: self._acting.trim_share(fraction))

    def restore(self, max_bytes: int | None = None) -> Result:
        """Bring back (up to `max_bytes` of) what is masked, slice by slice. Raises EngineError."""
        return self._undisturbed(lambda: self._acting.restore_all(max_bytes))

    def park(self, sequence: int | None = None, *, pid: int | None = None) -> Result:
        """Park what nobody decodes (of `pid`), or `sequence`; decoding reads it back. Raises EngineError."""
        return self._undisturbed(lambda: self._acting.park(sequence, pid))

    def unpark(self, sequence: int | None = None, *, pid: int | None = None) -> Result:
        """Read back what is parked before somebody needs it. Raises EngineError."""
        return self._undisturbed(lambda: self._acting.unpark(sequence, pid))

    def limit(self, share: float | None = None, *, n_bytes: int | None = None) -> None:
        """Limit these caches alone to a share, or to bytes in all; neither lifts it. Raises BadInputError."""
        self._limit.set(share, n_bytes)

    def protect(self, start: int, stop: int, sequence: int | None = None) -> None:
        """Never mask positions `start` to `stop` (exclusive) of `sequence` (default each), until `unprotect`.

        They are positions, not tokens: they can be marked before they are decoded, and stay marked whatever
        is decoded there. Raises BadInputError.
        """
        self._planner.protect(Range(start, stop), sequence)
        self._undisturbed(self._recalling.now)

    def unprotect(self, start: int = 0, stop: int | None = None, sequence: int | None = None) -> None:
        """Take the protection off the positions `start` to `stop` (default all). Raises BadInputError."""
        self._planner.unprotect(Range(start, sys.maxsize if stop is None else stop), sequence)

    def subscribe(self, subscriber: Callable[[Event], None]) -> Callable[[], None]:
        """Call `subscriber` with every event, in the thread where it happens; gives a function to end it."""
        return self._bus.subscribe(subscriber)

    def observe(self, observer: Callable[[Turn], None]) -> Callable[[], None]:
        """Call `observer` with every turn of the loop, before it acts; gives a function to end it."""
        return self._turns.subscribe(observer)

    def has_room(self) -> bool:
        """Whether there is no pressure now, and headroom above the low line."""
        if self._ended:
            return True  # closed: what it saw last is no reason to hold anything back for ever
        return has_room(self.config, self._state, self._reading)

    def recomputed(self, cells: int, seconds: float) -> None:
        """The engine's owner decoded tokens again."""
        self._bus.tell(Recomputed(time_s=self._clock(), cells=cells, seconds=seconds))

    def _undisturbed(self, action: Callable[[], _T]) -> _T:
        """Do it where no Ctrl-C can split it."""
        if self._ended or self._worker.inside:
            return action()  # closed, or a subscriber that acts: it would wait for itself
        return self._worker.do(action)

    # -- the loop ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Act by itself from now on. Calling it again changes nothing."""
        if self._thread is not None or self._ended:
            return
        if self.config.status_socket:
            self._socket.start()
        # The thread knows the governor weakly: a model that is dropped without close() goes all the same.
        try:
            self._thread = started(weakref.ref(self), self._sensor.sleeper, self._ended)
        except RuntimeError as error:
            self._bus.degrade("governor", f"it acts by hand only: {error} (raise TasksMax= of the unit)")

    def step(self) -> float:
        """One turn: read, decide, act. Gives the seconds until the next. Raises nothing."""
        try:
            if (calm_s := self._calm.glance()) is not None:
                return calm_s
            reading = self._sensor.read()
            if reading is not None:
                self._reading = reading = self.work.taken_off(reading)
                if not self._calm.nothing_new(self._state, reading):
                    self._turn(reading)
                pause = pause_s(self.config, reading, self._state)
                return self._calm.goes_by(self._state, reading, pause)
        except EngineError as error:
            _log.info("the engine is gone, and its governor ends: %s", error)
            self._acting.tell_caches(Snapshot(time_s=self._clock()))
            self._ended.set()
            return _FAILED_S
        except Exception as error:
            self._bus.degrade("governor", f"a turn failed ({words(error)})")
            _log.debug("the turn that failed", exc_info=True)
            return _FAILED_S
        return pause_s(self.config, self._reading, self._state)

    def _turn(self, reading: Reading) -> None:
        old = self._state.mode
        snapshot = self._engine.snapshot()
        self._acting.tell_caches(snapshot)
        cache = self._planner.holdings(snapshot)
        self._state = self._calm.caught_up(self._state)
        self._calm.last_used_s = cache.last_used_s
        limit = self._limit.share_of(cache.total_bytes)
        decision, self._state = decide(self.config, self._state, reading, cache, limit)
        self._reason = decision.reason
        if self._turns:
            jitter = self._state.jitter
            self._turns.tell(
                Turn(reading=reading, cache=cache, cache_limit=limit, decision=decision, jitter=jitter)
            )
        if decision.mode is not old:
            self._bus.tell(
                ModeChanged(time_s=reading.time_s, old=old, new=decision.mode, reason=decision.reason)
            )
        self._recalling.turn(snapshot, acute=decision.urgent or decision.mode is Mode.TRIMMING)
        self._acting.carry_out(decision, snapshot)
        pressed = decision.mode in {Mode.TRIMMING, Mode.HOLDING} and self._state.quiet_since_s is None
        self._refusing.turn(snapshot, pressed=pressed)
        self._sensor.tell_neighbours(cache, self._state)

    # -- the end ----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop the loop. Safe to call twice. The engine is its owner's to close."""
        if self._forked:
            return
        self._ended.set()
        caller = threading.current_thread()
        if self._worker.inside:
            self._close(caller)
        else:
            self._worker.do(lambda: self._close(caller))
        self._worker.close()

    def _close(self, caller: threading.Thread) -> None:
        if not self._closing.acquire(blocking=False):
            return  # somebody does it, who needs the other thread: the status socket may wait for a look
        try:
            self._sensor.interrupt()
            if self._thread is not None and self._thread is not caller:
                self._thread.join()
            self._socket.close()
            self._sensor.close()
        finally:
            self._closing.release()

    def after_fork(self) -> None:
        """In a forked child: no thread came along, locks may be held for ever; its cache is ungoverned."""
        self._forked = True
        self._ended.set()
        self._thread = None
        self._worker.abandon()
        self._engine.after_fork()
        self._closing = threading.Lock()
        self._acting.work = OwnWork()

    def __enter__(self) -> Governor:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
