"""The loop that wires the rooms: a reading to the law, its decision to the policy, ranges to the engine."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

from psi_kv_governor.acting import Acting
from psi_kv_governor.bus import Bus, Subscribers
from psi_kv_governor.config import GovernorConfig, load_config
from psi_kv_governor.control import Action, LawState, Mode, Turn, decide, pause_s
from psi_kv_governor.engine.base import Capabilities, Engine, RestoreResult, TrimResult
from psi_kv_governor.errors import BadInputError, EngineError, PsiKvError
from psi_kv_governor.events import Event, ModeChanged, Recomputed
from psi_kv_governor.ledger import SPILLED
from psi_kv_governor.lifetime import open_governors, run
from psi_kv_governor.own_work import OwnWork
from psi_kv_governor.policy import Policy, Range, get_policy
from psi_kv_governor.policy.chooser import Chooser, check_served
from psi_kv_governor.pressure.reading import PressureSource, Reading
from psi_kv_governor.sensor import Sensor
from psi_kv_governor.status import Status
from psi_kv_governor.status_socket import StatusSocket
from psi_kv_governor.store import open_store
from psi_kv_governor.store.base import Store

_T = TypeVar("_T")
_cache_limit: float | None = None

_CALM_TURN_S = 1.0
"""Longest between two turns of the whole loop while nothing happens."""


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
    """Watches the machine and trims and restores one engine's cache.

    Acts by itself from `start` to `close`, in one thread; `step` is one turn of that loop. A failure in it
    never reaches the model: it is said once, as a Degraded event and in the log, and the loop goes on with
    what still works. Raises BadInputError for a policy or a store that can't be used.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        source: PressureSource | None = None,
        policy: Policy | None = None,
        store: Store | None = None,
        config: GovernorConfig | None = None,
    ) -> None:
        """Without a `source` the best of this machine is found; `store` and `policy` come from `config`."""
        self.config = config or load_config()
        self._engine = engine
        self._bus = Bus()
        self._turns: Subscribers[Turn] = Subscribers()
        self._chooser = self._open_chooser(policy or get_policy(self.config.policy))
        self._opened = None if store is not None else self._open_store()  # what it opened, it closes
        self._store = store if store is not None else self._opened
        self._reading = Reading(time_s=time.monotonic(), interval_s=0.0, some=0.0, full=0.0)
        self._state = LawState()
        self._stop = threading.Event()
        self._forked = False
        self._thread: threading.Thread | None = None
        # Cache changes by hand run here, where no Ctrl-C can split them.
        self._hand = ThreadPoolExecutor(max_workers=1, thread_name_prefix="psi-kv-hand")
        self._hand_ident: int | None = None
        self._sensor = Sensor(source, self._bus)
        self._acting = Acting(engine, self._chooser, self._store, self._bus, self.config)
        self._socket = StatusSocket(self)
        open_governors.add(self)

    def _open_chooser(self, policy: Policy) -> Chooser:
        engine, bus = self._engine, self._bus
        if engine.capabilities.spill.able:  # else nothing is ever chosen
            check_served(policy, engine.evidence)
            engine.evidence.collect(policy.needs)
        return Chooser(
            policy,
            engine.evidence,
            engine.ledger,
            self.config,
            row_bytes=engine.row_bytes,
            complain=lambda why: bus.degrade("policy", why),
        )

    def _open_store(self) -> Store | None:
        try:
            return open_store(self.config)
        except PsiKvError as error:
            if self.config.store_dir:
                raise  # it was named: a mistake, not a machine's limit
            self._bus.degrade("spill", f"{error}; what goes is evicted and recomputed later")
            return None

    # -- by hand ----------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        """What the engine can do with this model here, and why not the rest."""
        return self._engine.capabilities

    def status(self) -> Status:
        """How things stand now; costs no safe point."""
        cache = self._acting.snapshot()
        return Status(
            mode=self._state.mode,
            source=self._sensor.name,
            some=self._reading.some,
            full=self._reading.full,
            headroom_bytes=self._reading.headroom_bytes,
            live_cells=cache.live_cells,
            spilled_cells=cache.spilled_cells,
            lost_cells=cache.lost_cells,
            cell_bytes=cache.cell_bytes,
            store_bytes=self._store.used_bytes if self._store else 0,
        )

    def trim(self, fraction: float = 0.5) -> TrimResult:
        """Give up `fraction` (0 to 1) of the cells that may go, now. Raises BadInputError, EngineError."""
        if not 0.0 <= fraction <= 1.0:
            raise BadInputError(f"a fraction of {fraction} is not usable: give a share from 0 to 1")
        return self._undisturbed(
            lambda: self._acting.trim(round(fraction * self._acting.snapshot().trimmable_cells), "by hand")
        )

    def restore(self, max_cells: int | None = None) -> RestoreResult:
        """Put back (up to `max_cells` of) what waits in the store. Lost cells wait for the next request."""
        return self._undisturbed(
            lambda: self._acting.restore(
                self._engine.ledger.count(SPILLED) if max_cells is None else max_cells
            )
        )

    def protect(self, start: int, stop: int) -> None:
        """Never give up the positions `start` to `stop` (exclusive) of the context, until `unprotect`.

        They are positions, not tokens: they can be marked before they are decoded, and stay marked whatever
        is decoded there. Raises BadInputError.
        """
        self._chooser.protect(_positions(start, stop))

    def unprotect(self, start: int = 0, stop: int | None = None) -> None:
        """Take the protection off the positions `start` to `stop` (default all). Raises BadInputError."""
        self._chooser.unprotect(_positions(start, sys.maxsize if stop is None else stop))

    def protect_head(self, cells: int) -> None:
        """The first `cells` positions hold the system prompt now: they are never given up."""
        self._chooser.head_cells = cells

    def subscribe(self, subscriber: Callable[[Event], None]) -> Callable[[], None]:
        """Call `subscriber` with every event, in the thread where it happens; gives a function to end it."""
        return self._bus.subscribe(subscriber)

    def observe(self, observer: Callable[[Turn], None]) -> Callable[[], None]:
        """Call `observer` with every turn of the loop, before it acts; gives a function to end it."""
        return self._turns.subscribe(observer)

    def has_room_for(self, cells: int) -> bool:
        """Whether so many cells may come back: no pressure now, and headroom for them above the low line."""
        if self._stop.is_set():
            return True  # closed: what it saw last is no reason to hold anything back for ever
        mode, quiet = self._state.mode, self._state.quiet_since_s is not None
        if mode is Mode.TRIMMING or (mode is Mode.HOLDING and not quiet):
            return False
        reading = self._reading
        if reading.headroom_bytes is None or reading.limit_bytes is None:
            return True
        spare_bytes = reading.headroom_bytes - self.config.headroom_low * reading.limit_bytes
        return cells * self._engine.cell_bytes <= spare_bytes

    def recomputed(self, cells: int, seconds: float) -> None:
        """The engine's owner decoded lost tokens again."""
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
            self._reading = reading = self._acting.work.taken_off(reading)
            if not self._nothing_new(reading):
                self._act(reading)
        return pause_s(self.config, self._reading)

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
        cache, limit = self._acting.snapshot(), _cache_limit
        decision, self._state = decide(self.config, self._state, reading, cache, limit)
        self._turns.tell(Turn(reading=reading, cache=cache, cache_limit=limit, decision=decision))
        if decision.mode is not old:
            self._bus.tell(
                ModeChanged(time_s=reading.time_s, old=old, new=decision.mode, reason=decision.reason)
            )
        try:
            if decision.action is Action.TRIM:
                self._acting.trim(decision.cells, decision.reason, urgent=decision.urgent)
            elif decision.action is Action.RESTORE:
                self._acting.restore(decision.cells)
            else:
                self._acting.release()
        except EngineError as error:
            self._bus.degrade("trim", str(error))

    # -- the end ----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop the loop and forget what is in the store. Safe to call twice."""
        if self._forked:
            return
        self._stop.set()
        self._sensor.interrupt()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._socket.close()
        self._hand.shutdown(wait=threading.get_ident() != self._hand_ident)
        self._sensor.close()
        if self._opened is not None:
            self._opened.close()

    def after_fork(self) -> None:
        """In a forked child: threads did not come along, and locks may be held for ever by those that had
        them. The child's copy of the cache is its own, ungoverned; the store's files are read as before."""
        self._forked = True
        self._stop.set()
        self._thread = None
        self._acting.work = OwnWork()

    def __enter__(self) -> Governor:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
