"""The contract of an engine, on the caches of transformers models in this process."""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import NamedTuple

from psi_kv_governor.cache import (
    CacheState,
    Capabilities,
    Capability,
    Description,
    Kind,
    Plan,
    Range,
    Result,
    SequenceState,
    Snapshot,
    Step,
    Verb,
    cells_in,
)
from psi_kv_governor.engines.transformers.cache import GovernedCache
from psi_kv_governor.engines.transformers.evidence import CacheEvidence, Watch
from psi_kv_governor.engines.transformers.places import cells_after, first_cells
from psi_kv_governor.errors import EngineError
from psi_kv_governor.residence import Done, Part, Place
from psi_kv_governor.residence.mapping import NO_PLACE

CHUNK_BYTES = 64 << 20
"""Rows that are moved aside or brought back between two looks at the clock: 512 cells of an 8B model."""
PATIENCE_S = 2.0
"""Longest that a forward pass is waited for: a decoded token takes less, and a long prompt is not worth it."""
NOTHING_THROWN_AWAY = "there is a place to park, so nothing is thrown away"
_RUNNING_S = 1.0  # a sequence counts as running so long after its last token

_Doing = Callable[[GovernedCache, Step, "_Account"], None]


class _Account(NamedTuple):
    """What a plan still allows, and what was done so far."""

    until: float
    max_bytes: float
    sums: dict[str, int]
    problems: list[str]

    def add(self, **sums: int) -> None:
        for name, number in sums.items():
            self.sums[name] = self.sums.get(name, 0) + number

    @property
    def moved_bytes(self) -> int:
        return self.sums.get("bytes_returned", 0) + self.sums.get("bytes_back", 0)

    @property
    def left_bytes(self) -> float:
        return self.max_bytes - self.moved_bytes

    @property
    def up(self) -> bool:
        return time.monotonic() > self.until or self.left_bytes <= 0

    @property
    def left_s(self) -> float:
        return max(0.0, self.until - time.monotonic())


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
            caches=tuple(map(_state, caches)),
            written_bytes=sum(cache.written_bytes for cache in caches),
            store_bytes=sum(
                mapping.stored_bytes
                for cache in caches
                for mapping in (*(rows.mapping for rows in cache.tensors), *(it.mapping for it in cache.asides))
            ),
        )

    def apply(self, plan: Plan) -> Result:
        """See Engine. Ranges go in chunks of 64 MiB, each in all layers or in none."""
        started = time.monotonic()
        most = math.inf if plan.max_bytes is None else plan.max_bytes
        account = _Account(started + plan.deadline_s, most, {}, [])
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
                    _DOING.get(step.verb, _nothing)(cache, step, account)
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

    def close(self) -> None:
        """See Engine. What can't be brought back stays parked, and its cache as it is."""
        if self._closed:
            return
        for undo in self.on_close:
            undo()
        caches = self._all()
        self._closed = True
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


# -- the steps ---------------------------------------------------------------------------------------------


def _write_behind(cache: GovernedCache, step: Step, account: _Account) -> None:
    del step
    _each(cache, account, lambda mapping, part, left: mapping.write_behind([part], left))


def _park(cache: GovernedCache, step: Step, account: _Account) -> None:
    del step
    account.add(bytes_returned=cache.release())
    if _each(cache, account, lambda mapping, part, left: mapping.park([part], left)):
        account.add(cells=cache.places.live_cells)


def _unpark(cache: GovernedCache, step: Step, account: _Account) -> None:
    del step
    most = account.left_bytes
    for rows in cache.tensors:
        left = None if math.isinf(most) else int(account.left_bytes)
        done = rows.mapping.unpark([rows.part], left, account.left_s)
        account.add(bytes_back=done.bytes_back)
        if done.problem or not done.finished:
            account.add(cut=1)
            account.problems.extend(filter(None, [done.problem]))
            return
    account.add(cells=cache.places.live_cells)


def _each(cache: GovernedCache, account: _Account, do: Callable[..., Done]) -> bool:
    """Do something to the rows of every tensor; false where it was cut short."""
    for rows in cache.tensors:
        done = do(rows.mapping, rows.part, account.left_s)
        account.add(bytes_returned=done.bytes_returned, written_bytes=done.written_bytes)
        cache.written_bytes += done.written_bytes
        if done.problem or not done.finished or account.up:
            account.add(cut=1)
            account.problems.extend(filter(None, [done.problem]))
            return False
    return True


def _release(cache: GovernedCache, step: Step, account: _Account) -> None:
    del step
    account.add(bytes_returned=cache.release())


def _take_out(cache: GovernedCache, step: Step, account: _Account, *, keep: bool) -> None:
    wanted = cache.places.live_part(step.ranges or [Range(0, cache.places.next_position)])
    for chunk in _chunks(wanted, cache, account):
        before = cache.written_bytes
        returned, problem = cache.take_out(chunk, keep=keep)
        if problem:
            account.problems.append(problem)
            return
        cells = cells_in(chunk)
        masked = cells if keep else 0
        account.add(
            bytes_returned=returned, cells=cells, masked=masked, written_bytes=cache.written_bytes - before
        )


def _mask(cache: GovernedCache, step: Step, account: _Account) -> None:
    _take_out(cache, step, account, keep=True)


def _evict(cache: GovernedCache, step: Step, account: _Account) -> None:
    if cache.place is not None:
        account.problems.append(NOTHING_THROWN_AWAY)
        return
    _take_out(cache, step, account, keep=False)


def _unmask(cache: GovernedCache, step: Step, account: _Account) -> None:
    wanted = cache.places.masked_part(step.ranges or cache.places.masked)
    for chunk in _chunks(wanted, cache, account):
        try:
            cells = cache.put_back(chunk)
        except (OSError, MemoryError) as error:
            account.problems.append(f"it can't be brought back: {error}")
            return
        account.add(bytes_back=cells * cache.cell_bytes, cells=cells)


def _nothing(cache: GovernedCache, step: Step, account: _Account) -> None:
    del cache, account
    raise EngineError(f"this engine knows no step {step.verb}")


_DOING: dict[Verb, _Doing] = {
    Verb.WRITE_BEHIND: _write_behind,
    Verb.RELEASE: _release,
    Verb.PARK: _park,
    Verb.MASK: _mask,
    Verb.EVICT: _evict,
    Verb.UNMASK: _unmask,
    Verb.UNPARK: _unpark,
}


def _chunks(wanted: list[Range], cache: GovernedCache, account: _Account) -> Iterable[list[Range]]:
    """`wanted` piece by piece, while the plan allows it; a piece is never larger than the bytes left."""
    while wanted:
        allowed = min(CHUNK_BYTES, account.left_bytes) // max(1, cache.cell_bytes)
        if account.up or allowed < 1:
            account.add(cut=1)
            return
        chunk = first_cells(wanted, int(allowed))
        wanted = cells_after(wanted, chunk[-1].stop)
        yield chunk


# -- how a cache stands ------------------------------------------------------------------------------------


def _state(cache: GovernedCache) -> CacheState:
    tensors, places = cache.tensors, cache.places
    live_cells = places.live_cells
    live: list[tuple[Part, Part]] = [
        ((0, live_cells * rows.row_bytes), (live_cells * rows.row_bytes, rows.part[1])) for rows in tensors
    ]
    resident = sum(rows.mapping.resident_bytes([rows.part]) for rows in tensors)
    free = sum(rows.mapping.resident_bytes([part[1]]) for rows, part in zip(tensors, live, strict=True))
    dirty = [rows.mapping.dirty_bytes([rows.part]) for rows in tensors]
    used = sum(rows.part[1] for rows in tensors)
    sequence = SequenceState(
        id=0,
        next_position=places.next_position,
        live=places.live,
        masked=places.masked,
        lost=places.lost,
        affected=cache.affected,
        parked_bytes=max(0, used - resident),
        dirty_bytes=sum(number or 0 for number in dirty),
        running=cache.running or time.monotonic() - cache.last_used_s < _RUNNING_S,
        last_used_s=cache.last_used_s,
    )
    return CacheState(
        id=cache.id,
        name=cache.name,
        pid=os.getpid(),
        capacity_cells=cache.capacity_cells,
        cell_bytes=cache.cell_bytes,
        row_bytes=min((rows.row_bytes for rows in tensors), default=0),
        resident_bytes=resident,
        free_resident_bytes=free,
        maskable=cache.place is not None,
        why_not_maskable="" if cache.place is not None else NO_PLACE,
        sequences=(sequence,) if tensors else (),
    )
