"""The last step of the ladder: a program's own prompt cache is asked to become smaller."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from psi_kv_governor.cache import Engine, Snapshot

_STUCK_S = 2.0
"""A saved state is parked in a turn or two under pressure; one that is not has no place to go."""


@runtime_checkable
class RefusesBlobs(Protocol):
    """An engine, besides, whose programs make their own prompt cache smaller when they are refused memory."""

    def refuse_blobs(self, refuse: bool) -> None:
        """Refuse new entries of a prompt cache, never a checkpoint, until told otherwise."""


class Refusing:
    """Refuses while there is pressure and saved states can't be parked: no place, or no space in it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._refusing = engine if isinstance(engine, RefusesBlobs) else None
        self._waiting_s: dict[tuple[int, int], float] = {}
        self._refuses = False

    def turn(self, snapshot: Snapshot, *, pressed: bool) -> None:
        """One turn of the loop. Raises EngineError."""
        if self._refusing is None:
            return
        wanted = pressed and self._no_place(snapshot)
        if not pressed:
            self._waiting_s.clear()
        if wanted is not self._refuses:
            self._refuses = wanted
            self._refusing.refuse_blobs(wanted)

    def _no_place(self, snapshot: Snapshot) -> bool:
        since_s = {
            (cache.id, blob.id): self._waiting_s.get((cache.id, blob.id), snapshot.time_s)
            for cache in snapshot.caches
            for blob in cache.blobs
            if not blob.parked
        }
        self._waiting_s = since_s
        park = self._engine.describe().capabilities.park
        stuck = any(snapshot.time_s - begin_s >= _STUCK_S for begin_s in since_s.values())
        return (bool(snapshot.caches) and not park.able) or stuck
