"""One call of an engine at a time, whoever calls."""

from __future__ import annotations

import threading

import msgspec

from psi_kv_governor.cache.engine import Engine
from psi_kv_governor.cache.evidence import Evidence, Kind
from psi_kv_governor.cache.plan import Plan, Result
from psi_kv_governor.cache.snapshot import Capability, Description, Snapshot


class OneAtATime:
    """An `Engine` that passes calls on to another one after the other.

    For threads that no Ctrl-C reaches: it would leave the lock closed.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._why_no_parking = ""

    def stop_parking(self, why: str) -> None:
        """Have it be an engine without a place from now on: what is parked already stays readable."""
        self._why_no_parking = why

    def describe(self) -> Description:
        """See Engine."""
        with self._lock:
            told = self._engine.describe()
        if not self._why_no_parking:
            return told
        unable = Capability(able=False, why=self._why_no_parking)
        able = msgspec.structs.replace(told.capabilities, park=unable, mask=unable, blobs=unable)
        return msgspec.structs.replace(told, capabilities=able, place="")

    def snapshot(self) -> Snapshot:
        """See Engine."""
        with self._lock:
            return self._engine.snapshot()

    def apply(self, plan: Plan) -> Result:
        """See Engine."""
        with self._lock:
            return self._engine.apply(plan)

    def collect(self, kinds: frozenset[Kind]) -> None:
        """See Engine."""
        with self._lock:
            self._engine.collect(kinds)

    def evidence(self, cache: int, sequence: int) -> Evidence:
        """See Engine."""
        with self._lock:
            return self._engine.evidence(cache, sequence)

    def close(self) -> None:
        """See Engine."""
        with self._lock:
            self._engine.close()

    def after_fork(self) -> None:
        """In a forked child: a thread that did not come along may have held the lock."""
        self._lock = threading.Lock()
