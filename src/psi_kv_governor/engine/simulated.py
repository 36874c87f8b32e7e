"""A cache that only counts: for `simulate`, and for tests of everything above the engine."""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from psi_kv_governor.engine.base import Capabilities, Capability, RestoreResult, TrimResult, Worth
from psi_kv_governor.engine.paper import PaperEvidence
from psi_kv_governor.errors import BlobCorruptError, EngineError, StoreError, StoreFullError
from psi_kv_governor.ledger import LIVE, LOST, SPILLED, Ledger
from psi_kv_governor.policy.base import Range
from psi_kv_governor.store.base import BlobTag, Store

CELL_BYTES = 23_040
"""A cell of SmolLM2-135M in f16: 30 layers of K and V rows of 384 bytes each."""

# Measured with that model on two x86-64 cores, 3,776 cells (87 MB) at once.
SPILL_BYTES_PER_S = 1.02e9
RESTORE_BYTES_PER_S = 1.26e9
RELEASE_BYTES_PER_S = 11.8e9


class _Blob(NamedTuple):
    positions: Range
    key: int


class SimulatedEngine:
    """An Engine whose cells are bytes on paper. Times are told, never waited for.

    A spilled range goes to the store in blobs of at most `blob_cells` cells that begin at multiples of
    it, so a restore of whole blocks always finds blobs that fit. What was given up last comes back first.
    """

    def __init__(self, capacity: int, cell_bytes: int = CELL_BYTES, blob_cells: int = 64) -> None:
        self._ledger = Ledger(capacity)
        self._capacity = capacity
        self._cell_bytes = cell_bytes
        self._blob_cells = blob_cells
        self._blobs: list[_Blob] = []
        self._resident_cells = 0  # live cells, and free ones whose pages were not returned yet
        self._lock = threading.RLock()
        self._evidence = PaperEvidence(self._ledger)

    @property
    def name(self) -> str:
        """How events and `doctor` call it."""
        return f"simulated cache of {self._capacity} cells"

    @property
    def capabilities(self) -> Capabilities:
        """It releases and spills. It has no model, so it decodes nothing again."""
        return Capabilities(
            release=Capability(True),
            spill=Capability(True),
            recompute=Capability(False, "a simulated cache has no model that could decode tokens again"),
        )

    @property
    def cell_bytes(self) -> int:
        """Bytes of one cell."""
        return self._cell_bytes

    @property
    def row_bytes(self) -> int:
        """It counts bytes and has no pages: a row of any length comes free."""
        return mmap.PAGESIZE

    @property
    def ledger(self) -> Ledger:
        """Where each token of the sequence is."""
        return self._ledger

    @property
    def evidence(self) -> PaperEvidence:
        """Made up, but the same for every context of this size."""
        return self._evidence

    @property
    def resident_bytes(self) -> int:
        """Bytes of the cache that the operating system does not have."""
        return self._resident_cells * self._cell_bytes

    def grow(self, cells: int) -> None:
        """Decode `cells` tokens. Raises EngineError when the context has no room for them."""
        with self._lock:
            end = len(self._ledger)
            if end + cells > self._capacity:
                raise EngineError(f"{cells} tokens more than {end} do not fit in {self._capacity} cells")
            self._ledger.mark(Range(end, end + cells), LIVE)
            self._resident_cells = max(self._resident_cells, self._ledger.count(LIVE))

    def truncate(self, length: int, store: Store | None) -> None:
        """Forget the tokens from `length` on. Their pages stay until `release`, as llama.cpp leaves them.

        What a blob across the cut held before it can't be put back in part, so that is lost.
        """
        with self._lock:
            for blob in [blob for blob in self._blobs if blob.positions.stop > length]:
                self._blobs.remove(blob)
                if store is not None:
                    store.drop(blob.key)
                if blob.positions.start < length:
                    self._ledger.mark(Range(blob.positions.start, length), LOST)
            self._ledger.truncate(length)

    def at_safe_point(self, patience_s: float = math.inf) -> AbstractContextManager[None]:
        return nullcontext()

    def trim(self, ranges: Sequence[Range], store: Store | None, deadline_s: float = math.inf) -> TrimResult:
        """Give up the live cells of `ranges`; what the store does not take is evicted, and said. All that is
        spilled takes no time here, so that no deadline passes."""
        with self._lock:
            spilled = evicted = 0
            problem = ""
            for part in self._parts(ranges):
                if store is not None and not problem:
                    try:
                        self._blobs.append(_Blob(part, self._put(store, part)))
                    except StoreError as error:
                        problem = str(error)
                    else:
                        self._ledger.mark(part, SPILLED)
                        spilled += part.cells
                        continue
                self._ledger.mark(part, LOST)
                evicted += part.cells
            returned_bytes = self._release()
            return TrimResult(
                cells=spilled + evicted,
                spilled=spilled,
                bytes_returned=returned_bytes,
                seconds=spilled * self._cell_bytes / SPILL_BYTES_PER_S + returned_bytes / RELEASE_BYTES_PER_S,
                problem=problem,
            )

    def restore(
        self,
        max_cells: int,
        store: Store | None,
        worth: Worth | None = None,
        patience_s: float = math.inf,
    ) -> RestoreResult:
        """Put whole blobs back as far as `max_cells` goes: by `worth`, or else the last spilled first."""
        with self._lock:
            cells, problem = 0, ""
            if store is None:
                return self._restored(0, "there is no store to restore from")
            waiting = self._blobs[::-1]
            if worth is not None:
                waiting.sort(key=lambda blob: worth(blob.positions), reverse=True)
            for blob in waiting:
                if cells + blob.positions.cells > max_cells:
                    break
                try:
                    store.get(blob.key, self._tag(blob.positions), self._zeros(blob.positions))
                except StoreError as error:
                    problem = str(error)
                    place = LOST
                else:
                    place = LIVE
                    cells += blob.positions.cells
                self._ledger.mark(blob.positions, place)
                self._blobs.remove(blob)
                store.drop(blob.key)
            self._resident_cells = max(self._resident_cells, self._ledger.count(LIVE))
            return self._restored(cells, problem)

    def release(self) -> int:
        """Return the pages of cells nobody uses. Gives the resident bytes returned."""
        with self._lock:
            return self._release()

    def _release(self) -> int:
        live = self._ledger.count(LIVE)
        returned, self._resident_cells = self._resident_cells - live, live
        return returned * self._cell_bytes

    def _restored(self, cells: int, problem: str) -> RestoreResult:
        return RestoreResult(
            cells=cells,
            seconds=cells * self._cell_bytes / RESTORE_BYTES_PER_S,
            missing=self._ledger.holes(),
            problem=problem,
        )

    def _parts(self, ranges: Sequence[Range]) -> Iterator[Range]:
        """The live runs of `ranges`, cut to the size of a blob: of each range as those before it left it."""
        for part in (part for wanted in ranges for part in list(self._ledger.ranges(LIVE, wanted))):
            start = part.start
            while start < part.stop:
                stop = min(part.stop, (start // self._blob_cells + 1) * self._blob_cells)
                yield Range(start, stop)
                start = stop

    def _put(self, store: Store, positions: Range) -> int:
        n_bytes = positions.cells * self._cell_bytes
        return store.put(self._tag(positions), n_bytes, self._zeros(positions))

    def _zeros(self, positions: Range) -> Iterator[memoryview]:
        """The rows of `positions`, made only if the store asks for them."""
        yield memoryview(bytearray(positions.cells * self._cell_bytes))

    def _tag(self, positions: Range) -> BlobTag:
        return BlobTag(
            model="simulated",
            library="simulated",
            layout=f"{self._cell_bytes} bytes a cell",
            start=positions.start,
            stop=positions.stop,
        )


class SimulatedStore:
    """A Store that counts bytes and keeps none. It checks tags, so a wrong restore still shows."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._blobs: dict[int, tuple[BlobTag, int]] = {}
        self._used_bytes = 0
        self._next_key = 0

    @property
    def used_bytes(self) -> int:
        """Bytes that blobs would take at the moment."""
        return self._used_bytes

    def room_bytes(self) -> int:
        """Bytes that a new blob may take."""
        return self._limit_bytes - self._used_bytes

    def put(self, tag: BlobTag, n_bytes: int, chunks: Iterable[memoryview]) -> int:
        """Count a blob and give its key. Raises StoreFullError when it is past the limit."""
        del chunks  # nothing is kept, so nothing has to be produced
        if n_bytes > self.room_bytes():
            raise StoreFullError(f"the store has room for {self.room_bytes()} bytes, not for {n_bytes}")
        key = self._next_key
        self._next_key += 1
        self._blobs[key] = (tag, n_bytes)
        self._used_bytes += n_bytes
        return key

    def get(self, key: int, tag: BlobTag, buffers: Iterable[memoryview]) -> None:
        """Fill nothing. Raises BlobCorruptError when `key` is not a blob of `tag`."""
        del buffers
        if key not in self._blobs or self._blobs[key][0] != tag:
            raise BlobCorruptError(f"blob {key} is not the one of positions {tag.start} to {tag.stop}")

    def drop(self, key: int) -> None:
        """Forget a blob. Unknown keys are ignored."""
        _, n_bytes = self._blobs.pop(key, (None, 0))
        self._used_bytes -= n_bytes

    def tidy(self) -> None:
        """Nothing is left to free."""

    def close(self) -> None:
        """Forget all blobs."""
        self._blobs.clear()
        self._used_bytes = 0
