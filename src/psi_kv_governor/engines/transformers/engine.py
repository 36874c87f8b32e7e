"""The contract of an engine, on the caches of transformers models in this process."""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable

from psi_kv_governor.cache import (
    Capabilities,
    Capability,
    Description,
    Kind,
    Plan,
    Recall,
    Recalled,
    Result,
    Snapshot,
)
from psi_kv_governor.engines.transformers.cache import GovernedCache
from psi_kv_governor.engines.transformers.evidence import CacheEvidence, Watch
from psi_kv_governor.engines.transformers.ledger import Ledger
from psi_kv_governor.engines.transformers.recall import Recaller
from psi_kv_governor.engines.transformers.state import state_of
from psi_kv_governor.engines.transformers.steps import NOTHING_THROWN_AWAY, Account, do
from psi_kv_governor.errors import EngineError
from psi_kv_governor.residence import Place
from psi_kv_governor.residence.mapping import NO_PLACE

PATIENCE_S = 2.0
"""Longest that a forward pass is waited for: a decoded token takes less, a long prompt longer."""


class TransformersEngine:
    """All governed caches of one or several models; see `psi_kv_governor.cache.Engine`."""

    def __init__(self, place: Place | None, why_no_place: str = NO_PLACE) -> None:
        self._place = place
        self._why_no_place = why_no_place
        self._caches: weakref.WeakSet[GovernedCache] = weakref.WeakSet()
        self._watches: weakref.WeakKeyDictionary[GovernedCache, Watch] = weakref.WeakKeyDictionary()
        self._kinds: frozenset[Kind] = frozenset()
        self._lock = threading.Lock()
        self._closed = False
        self._ledger = Ledger()
        self.details: dict[str, str] = {}
        """What else `describe` tells."""
        self.on_close: list[Callable[[], None]] = []
        """What else is to be undone at the end."""

    def add(self, cache: GovernedCache) -> None:
        """Govern `cache` for as long as it lives."""
        with self._lock:
            self._caches.add(cache)
            self._watches[cache] = Watch(cache)
        self._watches[cache].collect(self._kinds)
        self._have_recalled(cache)

    def describe(self) -> Description:
        """See Engine."""
        import torch

        import transformers

        no_place = Capability(able=False, why=self._why_no_place)
        parks = Capability(able=True) if self._place else no_place
        blobs = Capability(able=False, why="transformers keeps no saved states")
        evict = Capability(able=self._place is None, why="" if self._place is None else NOTHING_THROWN_AWAY)
        capabilities = Capabilities(
            release=Capability(able=True), park=parks, mask=parks, blobs=blobs, evict=evict
        )
        backings = {cache.backing for cache in self._all()}
        return Description(
            engine="transformers",
            capabilities=capabilities,
            backing="file" if "file" in backings else "memory",
            place=self._place.folder if self._place else "",
            details={"transformers": transformers.__version__, "torch": torch.__version__, **self.details},
        )

    def snapshot(self) -> Snapshot:
        """See Engine. Waits for no forward pass."""
        caches = self._all()
        return Snapshot(
            time_s=time.monotonic(),
            caches=tuple(map(state_of, caches)),
            written_bytes=sum(cache.written_bytes for cache in caches),
            store_bytes=sum(
                mapping.stored_bytes
                for cache in caches
                for mapping in (
                    *(rows.mapping for rows in cache.tensors),
                    *(it.mapping for it in cache.asides.files),
                )
            ),
        )

    def apply(self, plan: Plan) -> Result:
        """See Engine. Ranges go in chunks of 64 MiB, each in all layers or in none."""
        started = time.monotonic()
        most = math.inf if plan.max_bytes is None else plan.max_bytes
        account = Account(started + plan.deadline_s, most, {}, [])
        by_id = {cache.id: cache for cache in self._all()}
        done = True
        for step in plan.steps:
            if account.up:
                done = False
                break
            cache = by_id.get(step.cache)
            if cache is None:
                account.problems.append(f"there is no cache {step.cache} any more")
                continue
            with cache.at_rest(min(account.left_s, PATIENCE_S)) as still:
                if still:
                    do(cache, step, account)
                else:
                    account.problems.append("a forward pass did not end in time")
        sums = account.sums
        return Result(
            bytes_returned=sums.get("bytes_returned", 0),
            bytes_back=sums.get("bytes_back", 0),
            cells=sums.get("cells", 0),
            masked=sums.get("masked", 0),
            written_bytes=sums.get("written_bytes", 0),
            done=done and not sums.get("cut", 0),
            seconds=time.monotonic() - started,
            problem="; ".join(dict.fromkeys(account.problems)),
        )

    def collect(self, kinds: frozenset[Kind]) -> None:
        """See Engine. Attention needs the last hidden states of the sampled layers."""
        self._kinds = kinds
        for watch in list(self._watches.values()):
            watch.collect(kinds)

    def evidence(self, cache: int, sequence: int) -> CacheEvidence:
        """See Engine."""
        for found in self._all():
            if found.id == cache and sequence == 0:
                return CacheEvidence(found, self._watches[found])
        raise EngineError(f"there is no sequence {sequence} in a cache {cache}")

    def recall(self, settings: Recall) -> None:
        """Exchange parked positions for live ones by itself, as `settings` say, until told otherwise."""
        self._ledger.settings = settings
        if settings.mode != "off":
            self._ledger.prepare()
        for cache in self._all():
            self._have_recalled(cache)

    def _have_recalled(self, cache: GovernedCache) -> None:
        if self._ledger.settings.mode == "off" or cache.recaller is not None:
            return
        with cache.at_rest(PATIENCE_S) as still:
            if still:
                cache.recaller = Recaller(cache, self._ledger)

    def recalled(self) -> Recalled:
        """What it did so far; why nothing can be recalled is said where it can't in any cache."""
        recallers = [cache.recaller for cache in self._all() if cache.recaller is not None]
        why = "" if self._place else self._why_no_place
        if recallers and not why:
            why = min((one.why_not for one in recallers), key=bool)
        summary_bytes = max((one.summary_bytes for one in recallers), default=0)
        return self._ledger.recalled(summary_bytes, why or self._ledger.why_not)

    def close(self) -> None:
        """See Engine. What can't be brought back stays parked, and its cache as it is."""
        if self._closed:
            return
        for undo in self.on_close:
            undo()
        caches = self._all()
        self._closed = True
        self._ledger.settings = Recall()
        for cache in caches:
            self._watches[cache].collect(frozenset())
            with cache.at_rest(math.inf) as still:
                if still:
                    cache.put_back(cache.places.masked)

    def _all(self) -> list[GovernedCache]:
        if self._closed:
            raise EngineError("this engine was closed")
        with self._lock:
            return sorted(self._caches, key=lambda cache: cache.id)
