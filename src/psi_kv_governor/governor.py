"""The loop that wires the rooms: a reading to the law, its decision to the policy, ranges to the engine."""

from __future__ import annotations

import atexit
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

from psi_kv_governor.bus import Bus, Subscribers
from psi_kv_governor.config import GovernorConfig, load_config
from psi_kv_governor.control import Action, CacheSnapshot, LawState, Mode, Turn, decide
from psi_kv_governor.engine.base import Capabilities, Engine, RestoreResult, TrimResult
from psi_kv_governor.errors import BadInputError, EngineError, PsiKvError
from psi_kv_governor.events import Event, ModeChanged, Recomputed, Released, Restored, Trimmed
from psi_kv_governor.ledger import LIVE, LOST, SPILLED
from psi_kv_governor.policy import Policy, Range, get_policy
from psi_kv_governor.policy.chooser import Chooser, check_served
from psi_kv_governor.pressure.reading import PressureSource, Reading
from psi_kv_governor.sensor import Sensor
from psi_kv_governor.status import Status
from psi_kv_governor.store import open_store
from psi_kv_governor.store.base import Store

_log = logging.getLogger("psi_kv_governor")
_T = TypeVar("_T")
_cache_limit: float | None = None


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
        self._thread: threading.Thread | None = None
        # Cache changes by hand run here, where no Ctrl-C can split them.
        self._hand = ThreadPoolExecutor(max_workers=1, thread_name_prefix="psi-kv-hand")
        self._hand_ident: int | None = None
        self._sensor = Sensor(source, self._bus)
        _open_governors.add(self)

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
        cache = self._snapshot()
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
            lambda: self._trim(round(fraction * self._snapshot().trimmable_cells), "by hand")
        )

    def restore(self, max_cells: int | None = None) -> RestoreResult:
        """Put back (up to `max_cells` of) what waits in the store. Lost cells wait for the next request."""
        return self._undisturbed(
            lambda: self._restore(self._engine.ledger.count(SPILLED) if max_cells is None else max_cells)
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
        """Call `observer` with every turn of the loop, before it is acted upon; gives a function to end it."""
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
                target=_run, args=(weakref.ref(self), self._stop), name="psi-kv-governor", daemon=True
            )
            self._thread.start()

    def step(self) -> float:
        """One turn: read, decide, act. Gives the seconds until the next."""
        reading = self._sensor.read()
        if reading is not None:
            self._reading = reading
            self._act(reading)
        return self._pause_s()

    def _act(self, reading: Reading) -> None:
        old = self._state.mode
        cache, limit = self._snapshot(), _cache_limit
        decision, self._state = decide(self.config, self._state, reading, cache, limit)
        self._turns.tell(Turn(reading=reading, cache=cache, cache_limit=limit, decision=decision))
        if decision.mode is not old:
            self._bus.tell(
                ModeChanged(time_s=reading.time_s, old=old, new=decision.mode, reason=decision.reason)
            )
        try:
            if decision.action is Action.TRIM:
                self._trim(decision.cells, decision.reason)
            elif decision.action is Action.RESTORE:
                self._restore(decision.cells)
            else:
                self._release()
        except EngineError as error:
            self._bus.degrade("trim", str(error))

    def _pause_s(self) -> float:
        reading = self._reading
        scarce = (
            reading.headroom_bytes is not None
            and reading.limit_bytes is not None
            and reading.headroom_bytes < self.config.headroom_plenty * reading.limit_bytes
        )
        return self.config.poll_busy_s if scarce or self._state.mode is not Mode.CALM else self.config.poll_s

    def _snapshot(self) -> CacheSnapshot:
        ledger = self._engine.ledger
        spilled, lost = ledger.count(SPILLED), ledger.count(LOST)
        return CacheSnapshot(
            live_cells=ledger.count(LIVE),
            spilled_cells=spilled,
            lost_cells=lost,
            trimmable_cells=self._chooser.trimmable() if self.capabilities.spill.able else 0,
            cell_bytes=self._engine.cell_bytes,
        )

    # -- acting -----------------------------------------------------------------------------------------

    def _trim(self, cells: int, reason: str) -> TrimResult:
        with self._engine.at_safe_point():  # what is chosen is still there when it goes
            result = self._engine.trim(self._chooser.choose(cells), self._store_in_time(cells))
        if result.problem:
            self._bus.degrade("spill", result.problem)
        self._bus.tell(
            Trimmed(
                time_s=time.monotonic(),
                cells=result.cells,
                spilled=result.spilled,
                bytes_returned=result.bytes_returned,
                seconds=result.seconds,
                reason=reason,
            )
        )
        return result

    def _store_in_time(self, cells: int) -> Store | None:
        """The store, unless writing so much would take longer than a trim may (the fourth rung: evict)."""
        rate = getattr(self._store, "write_bytes_per_s", None)
        if rate and cells * self._engine.cell_bytes / rate > self.config.spill_deadline_s:
            self._bus.degrade("spill", f"the store takes only {rate / 1e6:.0f} MB/s: what goes is evicted")
            return None
        return self._store

    def _restore(self, cells: int) -> RestoreResult:
        result = self._engine.restore(cells, self._store, self._chooser.worth)
        if result.problem:
            self._bus.degrade("restore", f"{result.problem}; the range is recomputed at the next request")
        self._bus.tell(
            Restored(
                time_s=time.monotonic(), cells=result.cells, seconds=result.seconds, missing=result.missing
            )
        )
        return result

    def _release(self) -> None:
        n_bytes = self._engine.release()
        if n_bytes:
            self._bus.tell(Released(time_s=time.monotonic(), bytes_returned=n_bytes))
        if self._store is not None:
            self._store.tidy()

    # -- the end ----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop the loop and forget what is in the store. Safe to call twice."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._hand.shutdown(wait=threading.get_ident() != self._hand_ident)
        self._sensor.close()
        if self._opened is not None:
            self._opened.close()

    def __enter__(self) -> Governor:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_open_governors: weakref.WeakSet[Governor] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Before the interpreter goes down: its daemon threads are frozen then, and joining one never ends."""
    for governor in list(_open_governors):
        governor.close()


def _run(governor: weakref.ref[Governor], stop: threading.Event) -> None:
    pause_s = 0.0
    while not stop.wait(pause_s):
        alive = governor()
        if alive is None:
            return
        try:
            pause_s = alive.step()
        except Exception:
            _log.exception("the governor failed in one turn and goes on")
            pause_s = 1.0
        del alive
