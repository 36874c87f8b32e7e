"""What a decision becomes: the policy's choice, the engine's trim or restore, and the event that tells it."""

from __future__ import annotations

import time

from psi_kv_governor.bus import Bus
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import CacheSnapshot
from psi_kv_governor.engine.base import Engine, RestoreResult, TrimResult
from psi_kv_governor.events import Released, Restored, Trimmed
from psi_kv_governor.ledger import LIVE, LOST, SPILLED
from psi_kv_governor.own_work import OwnWork
from psi_kv_governor.policy.chooser import Chooser
from psi_kv_governor.store.base import Store

_ACUTE_SPILL_S = 0.5
"""Longest that an urgent trim may write to the store; what is not written by then is evicted. 83 MB take
0.1 s where the disk does 0.75 GB/s; at 200 MB/s of somebody's taking, the low line of 8 GB lasts 1.6 s."""


class Acting:
    """Carries out on one engine what the law or a person asks for, from any thread: each in turn."""

    def __init__(
        self, engine: Engine, chooser: Chooser, store: Store | None, bus: Bus, config: GovernorConfig
    ) -> None:
        self.work = OwnWork()
        self._engine = engine
        self._chooser = chooser
        self._store = store
        self._bus = bus
        self._config = config

    def snapshot(self) -> CacheSnapshot:
        ledger = self._engine.ledger
        spilled, lost = ledger.count(SPILLED), ledger.count(LOST)
        return CacheSnapshot(
            live_cells=ledger.count(LIVE),
            spilled_cells=spilled,
            lost_cells=lost,
            trimmable_cells=self._chooser.trimmable() if self._engine.capabilities.spill.able else 0,
            cell_bytes=self._engine.cell_bytes,
        )

    def trim(self, cells: int, reason: str, *, urgent: bool = False) -> TrimResult:
        patience_s = 0.0 if urgent else self._config.interrupt_after_s
        deadline_s = _ACUTE_SPILL_S if urgent else self._config.spill_deadline_s
        # One safe point: what is chosen is still there when it goes.
        with self._engine.at_safe_point(patience_s), self.work:
            store = self._store_in_time(cells, deadline_s)
            result = self._engine.trim(self._chooser.choose(cells), store, deadline_s)
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

    def _store_in_time(self, cells: int, deadline_s: float) -> Store | None:
        """The store, unless writing a block would take longer than a trim may (the fourth rung: evict)."""
        rate = getattr(self._store, "write_bytes_per_s", None)
        least = min(cells, self._config.block_cells)
        if rate and least * self._engine.cell_bytes / rate > deadline_s:
            self._bus.degrade("spill", f"the store takes only {rate / 1e6:.0f} MB/s: what goes is evicted")
            return None
        return self._store

    def restore(self, cells: int) -> RestoreResult:
        with self.work:
            result = self._engine.restore(
                cells, self._store, self._chooser.worth, self._config.interrupt_after_s
            )
        if result.problem:
            self._bus.degrade("restore", f"{result.problem}; the range is recomputed at the next request")
        self._bus.tell(
            Restored(
                time_s=time.monotonic(), cells=result.cells, seconds=result.seconds, missing=result.missing
            )
        )
        return result

    def release(self) -> None:
        n_bytes = self._engine.release()
        if n_bytes:
            self._bus.tell(Released(time_s=time.monotonic(), bytes_returned=n_bytes))
        if self._store is not None:
            self._store.tidy()
