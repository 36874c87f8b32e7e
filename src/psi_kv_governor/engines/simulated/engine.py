"""The simulated engine: several caches that are bytes in a table, at no time but the one that is given."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable

import msgspec

from psi_kv_governor.cache import (
    Capabilities,
    Capability,
    Description,
    Evidence,
    Kind,
    Plan,
    Result,
    Snapshot,
    Step,
    Verb,
)
from psi_kv_governor.engines.simulated.cache import CELL_BYTES, PaperBlob, PaperCache
from psi_kv_governor.engines.simulated.evidence import PaperEvidence
from psi_kv_governor.engines.simulated.sequence import PaperSequence
from psi_kv_governor.errors import EngineError

# Measured with SmolLM2-135M on two x86-64 cores, 3,776 cells (87 MB) at once.
PARK_BYTES_PER_S = 1.02e9
RESTORE_BYTES_PER_S = 1.26e9
RELEASE_BYTES_PER_S = 11.8e9

_ABLE = Capability(able=True)
CAPABLE = Capabilities(release=_ABLE, park=_ABLE, mask=_ABLE, blobs=_ABLE)
"""Everything but dropping content."""


class SimulatedEngine:
    """An `Engine` without a model. Call `add_cache` first, and `decode` to fill it.

    `clock` gives monotonic seconds; `spend` is told of each span of work in seconds before `apply` returns,
    for a clock that stands otherwise. Parked bytes may take `place_limit_bytes` at the most.
    """

    def __init__(
        self,
        *,
        capabilities: Capabilities = CAPABLE,
        place_limit_bytes: int = sys.maxsize,
        clock: Callable[[], float] = time.monotonic,
        spend: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.caches: dict[int, PaperCache] = {}
        self._capabilities = capabilities
        self._place_limit_bytes = place_limit_bytes
        self._clock = clock
        self._spend = spend
        self._numbers = 0
        self._written_bytes = 0
        self._closed = False
        self._lock = threading.RLock()

    # -- what a program would do ------------------------------------------------------------------------

    def add_cache(
        self,
        capacity_cells: int,
        *,
        cell_bytes: int = CELL_BYTES,
        name: str = "simulated",
        pid: int | None = None,
        why_not_maskable: str = "",
    ) -> PaperCache:
        """Open a cache of so many cells; with a reason why it can't be masked, it is not maskable."""
        with self._lock:
            self._numbers += 1
            cache = PaperCache(
                self._numbers,
                capacity_cells,
                cell_bytes,
                name=name,
                pid=os.getpid() if pid is None else pid,
                why_not_maskable=why_not_maskable,
            )
            self.caches[cache.id] = cache
            return cache

    def remove_cache(self, number: int) -> None:
        """Its model was closed."""
        with self._lock:
            del self.caches[number]

    def decode(self, cells: int, *, cache: int = 1, sequence: int = 0) -> None:
        """Append tokens to a sequence; what is parked of it is read for it. Raises EngineError when full."""
        with self._lock:
            decoding = self.caches[cache]
            if came_back := decoding.decode(sequence, cells, self._clock()):
                self._spend(came_back * decoding.cell_bytes / RESTORE_BYTES_PER_S)

    def truncate(self, length: int, *, cache: int = 1, sequence: int = 0) -> None:
        """Forget the positions of a sequence from `length` on."""
        with self._lock:
            self.caches[cache].truncate(sequence, length)

    def save(self, n_bytes: int, *, cache: int = 1, kind: str = "prompt") -> int:
        """A saved state of so many bytes; gives its number."""
        with self._lock:
            self._numbers += 1
            blob = PaperBlob(self._numbers, n_bytes, self._clock(), kind)
            self.caches[cache].blobs[blob.id] = blob
            return blob.id

    # -- the contract -----------------------------------------------------------------------------------

    def describe(self) -> Description:
        return Description(engine="simulated", capabilities=self._capabilities)

    def snapshot(self) -> Snapshot:
        """All caches now. Raises EngineError after `close`."""
        with self._lock:
            self._check_open()
            now_s = self._clock()
            return Snapshot(
                time_s=now_s,
                caches=tuple(cache.state(now_s) for cache in self.caches.values()),
                written_bytes=self._written_bytes,
                store_bytes=self._parked_bytes(),
            )

    def apply(self, plan: Plan) -> Result:
        """Carry out `plan` in the table. A cache, sequence or blob that is gone meanwhile is passed over.
        Raises EngineError after `close`."""
        with self._lock:
            self._check_open()
            total = Result()
            for step in plan.steps:
                if total.seconds >= plan.deadline_s or self._moved(total) >= _most(plan):
                    total = msgspec.structs.replace(total, done=False)
                    break
                left_s = plan.deadline_s - total.seconds
                total = total.plus(self._step(step, _most(plan) - self._moved(total), left_s))
            self._written_bytes += total.written_bytes
        self._spend(total.seconds)
        return total

    def collect(self, kinds: frozenset[Kind]) -> None:
        """Nothing has to be gathered."""

    def evidence(self, cache: int, sequence: int) -> Evidence:
        """Made up, but the same for every sequence of that number. Raises EngineError where there is none."""
        with self._lock:
            self._check_open()
            held = self.caches.get(cache)
            if held is None or sequence not in held.sequences:
                raise EngineError(f"there is no sequence {sequence} in a cache {cache}")
            return PaperEvidence(held.sequences[sequence], held.capacity_cells, sequence)

    def close(self) -> None:
        """All masks are taken off: what was masked is read when it is needed. Safe to call twice."""
        with self._lock:
            self._closed = True
            for cache in self.caches.values():
                for sequence in cache.sequences.values():
                    sequence.unmask_all()

    # -- one step ---------------------------------------------------------------------------------------

    def _step(self, step: Step, most_bytes: float, left_s: float) -> Result:
        cache = self.caches.get(step.cache)
        if cache is None:
            return Result()
        if why := self._why_not(step, cache):
            return Result(problem=why)
        if step.verb is Verb.RELEASE:
            n_bytes = cache.free_resident_cells * cache.cell_bytes
            cache.free_resident_cells = 0
            return Result(bytes_returned=n_bytes, seconds=n_bytes / RELEASE_BYTES_PER_S)
        if step.blob is not None:
            return self._blob(step, cache)
        total = Result()
        for sequence in list(cache.of(step.sequence)):
            most = self._most_cells(step.verb, cache, most_bytes - self._moved(total), left_s - total.seconds)
            total = total.plus(self._sequence(step, cache, sequence, most))
        return total

    def _why_not(self, step: Step, cache: PaperCache) -> str:
        able = self._capabilities
        needed = {
            Verb.RELEASE: able.release,
            Verb.WRITE_BEHIND: able.park,
            Verb.PARK: able.park if step.blob is None else able.blobs,
            Verb.MASK: able.mask if able.park.able else able.park,
            Verb.EVICT: able.evict,
        }.get(step.verb)
        if needed is not None and not needed.able:
            return needed.why
        return cache.why_not_maskable if step.verb in {Verb.MASK, Verb.EVICT} else ""

    def _most_cells(self, verb: Verb, cache: PaperCache, most_bytes: float, left_s: float) -> int:
        """Cells that bytes, time and place leave room for; one at least, or nothing would ever come."""
        back = verb in {Verb.UNMASK, Verb.UNPARK}
        rate = RESTORE_BYTES_PER_S if back else PARK_BYTES_PER_S
        n_bytes = min(most_bytes, left_s * rate)
        cells = max(0, math.ceil(min(n_bytes, sys.maxsize) / cache.cell_bytes))
        if verb in {Verb.PARK, Verb.MASK}:
            room_bytes = self._place_limit_bytes - self._parked_bytes()
            cells = min(cells, max(0, room_bytes // cache.cell_bytes))
        return cells

    def _sequence(self, step: Step, cache: PaperCache, sequence: PaperSequence, most: int) -> Result:
        cells = returned = back = written = masked = 0
        if step.verb is Verb.PARK:
            cells, written = sequence.park(step.ranges, most)
            returned = cells
        elif step.verb is Verb.MASK:
            masked, returned, written = sequence.mask(step.ranges, most)
            cells = masked
        elif step.verb is Verb.EVICT:
            masked, returned = sequence.evict(step.ranges, most)
            cells = masked
        elif step.verb is Verb.UNMASK:
            cells = back = sequence.unmask(step.ranges, most)
        elif step.verb is Verb.UNPARK:
            cells = back = sequence.unpark(step.ranges, most)
        else:
            written = sequence.write(step.ranges, most)
        size = cache.cell_bytes
        full = step.verb in {Verb.PARK, Verb.MASK} and self._place_limit_bytes - self._parked_bytes() < size
        return Result(
            bytes_returned=returned * size,
            bytes_back=back * size,
            cells=cells,
            masked=masked,
            written_bytes=written * size,
            seconds=_seconds(written * size, returned * size, back * size),
            problem="the place for parked bytes is full" if full and cells == most else "",
        )

    def _blob(self, step: Step, cache: PaperCache) -> Result:
        blob = cache.blobs.get(step.blob) if step.blob is not None else None
        if blob is None:
            return Result()
        if step.verb is Verb.UNPARK:
            back = blob.n_bytes if blob.parked else 0
            blob.parked = False
            return Result(bytes_back=back, seconds=_seconds(0, 0, back))
        if step.verb not in {Verb.PARK, Verb.WRITE_BEHIND} or blob.parked:
            return Result()
        if blob.n_bytes > self._place_limit_bytes - self._parked_bytes():
            return Result(problem="the place for parked bytes is full")
        written = 0 if blob.written else blob.n_bytes
        blob.parked = blob.written = True
        return Result(
            bytes_returned=blob.n_bytes,
            written_bytes=written,
            seconds=_seconds(written, blob.n_bytes, 0),
        )

    def _parked_bytes(self) -> int:
        return sum(cache.parked_bytes for cache in self.caches.values())

    @staticmethod
    def _moved(result: Result) -> int:
        return max(result.bytes_returned, result.bytes_back)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the simulated engine is closed")


def _most(plan: Plan) -> float:
    return math.inf if plan.max_bytes is None else plan.max_bytes


def _seconds(written_bytes: int, returned_bytes: int, back_bytes: int) -> float:
    return (
        written_bytes / PARK_BYTES_PER_S
        + returned_bytes / RELEASE_BYTES_PER_S
        + back_bytes / RESTORE_BYTES_PER_S
    )
