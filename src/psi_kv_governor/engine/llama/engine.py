"""The engine for llama.cpp: trim, release, restore and recompute on a live context."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
from llama_cpp import _internals

from psi_kv_governor.engine.base import Capabilities, Capability, RestoreResult, TrimResult, Worth
from psi_kv_governor.engine.llama.batch import Batch, interrupt
from psi_kv_governor.engine.llama.cells import Cells
from psi_kv_governor.engine.llama.context import Sequences
from psi_kv_governor.engine.llama.decoding import Decoding
from psi_kv_governor.engine.llama.evidence import LlamaEvidence
from psi_kv_governor.engine.llama.parking import Parked, ParkingLot
from psi_kv_governor.engine.llama.rows import Rows
from psi_kv_governor.engine.llama.safepoint import SafePoint
from psi_kv_governor.engine.llama.tap import Tap
from psi_kv_governor.engine.llama.track import Track
from psi_kv_governor.errors import EngineError, StoreError
from psi_kv_governor.ledger import LIVE, LOST, Ledger
from psi_kv_governor.policy.base import Range
from psi_kv_governor.store.base import BlobTag, Store

# One blob: small enough that its pages go back while the next is written (16 MiB take about 15 ms), large
# enough that a store of 8 GiB needs no more than the usual 1,024 file descriptors.
_BLOB_BYTES = 16 << 20

# A single token mostly takes less; for the end of a prefill, freeing pages nobody uses can wait.
_RELEASE_WAIT_S = 0.02


class LlamaEngine:
    """Gives memory of one llama.cpp context back. Made by `GovernedLlama`, and proven by the self-test.

    `origin` names the model and the library in the tags of what it spills.
    """

    name = "llama.cpp"

    def __init__(
        self, context: _internals.LlamaContext, tap: Tap, rows: Rows, able: Capabilities, origin: BlobTag
    ) -> None:
        self.guard = SafePoint(lambda wanted: interrupt(tap, wanted))
        self.cell_bytes = rows.cell_bytes
        self.row_bytes = rows.smallest_row_bytes
        self.track = Track(Sequences(context), tap, rows, context.n_ctx())
        self.evidence = LlamaEvidence(tap, rows, self.track.map)
        self._rows = rows
        self._able = able
        self._origin = origin
        self._parking = ParkingLot()
        self._decoding = Decoding(context, tap, self.track, self.guard, self)
        self._demand_paged_bytes = tap.native.library.psikv_demand_paged_bytes

    @property
    def ledger(self) -> Ledger:
        return self.track.ledger

    @property
    def capabilities(self) -> Capabilities:
        if not self.track.distrust:
            return self._able
        off = Capability(False, f"{self.track.distrust}; until the cache is next empty")
        return Capabilities(release=off, spill=off, recompute=off)

    # -- what the context does --------------------------------------------------------------------------

    def decode(self, batch: Batch) -> None:
        """Decode `batch`. While a piece of it runs there is no safe point."""
        self._decoding.decode(batch)

    def mend_end(self, length: int) -> None:
        """llama.cpp decodes only right after the last live position: put back what is missing there."""
        sequences = self.track.sequences
        while sequences.length() < length == len(self.ledger) and not self.track.distrust:
            here = Range(sequences.length(), length)
            parked = self._parking.first(here)
            if parked is None or parked.wanted.start > here.start:
                self._decoding.again(next(self.ledger.ranges(LOST, here)))
                continue
            with contextlib.suppress(StoreError):  # its positions are lost then, and recomputed next
                self._put_back(parked, parked.wanted)

    def removed(self, start: int, stop: int) -> None:
        """[start, stop) was removed from the sequence; a stop of -1 means to the end."""
        length = len(self.ledger)
        gone = Range(start, length if stop < 0 else min(stop, length))
        if gone.cells > 0:
            self.track.sequences.remove(Sequences.PARKED, gone.start, gone.stop)
            for orphan in self._parking.drop(gone):
                self.track.sequences.remove(Sequences.PARKED, orphan.start, orphan.stop)
                self.track.map.lose(orphan)
        if start == 0 and gone.stop == length:
            self.track.emptied()
            self.evidence.emptied()
        elif gone.stop == length:
            self.track.truncate(gone.start)
        elif gone.cells > 0:
            self.track.settled = False
            self.track.map.lose(gone)

    def clear(self) -> None:
        """Empty the cache. Its pages go back; upstream zeroes them, which makes all of them resident."""
        with self.guard.hold():
            self.track.sequences.forget_all()
            self.removed(0, -1)
            self._release()

    @contextlib.contextmanager
    def emptied_upstream(self) -> Iterator[None]:
        """Around a call in which llama.cpp itself clears the whole cache, bytes and all. It is empty before.

        Where the tap was loaded too late, upstream zeroes by hand, and every row is resident afterwards.
        """
        with self.guard.hold():
            self.clear()
            before = self._demand_paged_bytes()
            try:
                yield
            finally:
                if self._demand_paged_bytes() == before:
                    self.track.map.all_written()

    # -- giving up --------------------------------------------------------------------------------------

    def at_safe_point(self, patience_s: float = math.inf) -> contextlib.AbstractContextManager[None]:
        """See Engine.at_safe_point."""
        return self.guard.hold(urgent=True, patience_s=patience_s)

    def trim(self, ranges: Sequence[Range], store: Store | None, deadline_s: float = math.inf) -> TrimResult:
        """See Engine.trim. The last position stays. Raises EngineError where no range can be given up."""
        begin = time.monotonic()
        cells = spilled = returned = 0
        problem = ""
        with self.guard.hold(urgent=True):
            self._catch_up()
            end = len(self.ledger) - 1
            clipped = [Range(run.start, min(run.stop, end)) for run in ranges if run.start < end]
            live = [part for run in clipped for part in self.ledger.ranges(LIVE, run)]
            if self.capabilities.spill.able:
                self.track.check({p for run in live for p in (run.start, run.stop - 1)})
            if not self.capabilities.spill.able:
                raise EngineError(f"this cache can't give up a range: {self.capabilities.spill.why}")
            for run in self._in_blobs(live):
                if store is not None and time.monotonic() - begin > deadline_s:
                    problem, store = f"the store did not take it in {deadline_s:g} s", None
                if store is not None:
                    try:
                        self._spill(run, store)
                        spilled += run.cells
                    except StoreError as error:
                        problem, store = str(error), None
                if store is None and not self._evict(run):
                    problem = "the tokens are not known, so they could not be recomputed"
                    continue
                cells += run.cells
                returned += self._release()
        seconds = time.monotonic() - begin
        return TrimResult(
            cells=cells, spilled=spilled, bytes_returned=returned, seconds=seconds, problem=problem
        )

    def release(self) -> int:
        """See Engine.release."""
        if not self.track.map.stale or not self.guard.enter_urgently(timeout_s=_RELEASE_WAIT_S):
            return 0
        try:
            return self._release()
        finally:
            self.guard.leave()

    def _catch_up(self) -> None:
        """Enter what was decoded past `decoding`, before its cells are taken for free ones."""
        if self.capabilities.release.able:
            self.track.catch_up()

    def _release(self) -> int:
        self._catch_up()
        returnable = self.track.map.returnable()
        if not len(returnable) or not self.capabilities.release.able:
            return 0
        returned = self._rows.release(returnable)
        self.track.map.released()
        return returned

    def _in_blobs(self, ranges: Sequence[Range]) -> Iterator[Range]:
        step = max(1, _BLOB_BYTES // self.cell_bytes)
        for run in ranges:
            for start in range(run.start, run.stop, step):
                yield Range(start, min(start + step, run.stop))

    def _spill(self, run: Range, store: Store) -> None:
        tag = msgspec.structs.replace(self._origin, start=run.start, stop=run.stop)
        key = store.put(tag, run.cells * self.cell_bytes, self._rows.chunks(self.track.map.cells(run)))
        self._parking.add(Parked(blob=run, wanted=run, tag=tag, store=store, key=key))
        self.track.sequences.move(Sequences.MAIN, Sequences.PARKED, run.start, run.stop)
        self.track.map.park(run)

    def _evict(self, run: Range) -> bool:
        if not self._decoding.can_again(run):
            return False
        self.track.sequences.remove(Sequences.MAIN, run.start, run.stop)
        self.track.map.lose(run)
        return True

    # -- back again -------------------------------------------------------------------------------------

    def restore(
        self,
        max_cells: int,
        store: Store | None = None,
        worth: Worth | None = None,
        patience_s: float = math.inf,
    ) -> RestoreResult:
        """See Engine.restore: lowest positions first without `worth`, with a safe point between blobs.

        Each blob knows its store, so that a range comes back also after the store was changed.
        """
        begin = time.monotonic()
        cells = 0
        problem = ""
        while cells < max_cells:
            with self.guard.hold(urgent=True, patience_s=patience_s):
                parked = self._parking.best(worth) if worth else self._parking.first()
                if parked is None:
                    break
                try:
                    cells += self._put_back(parked, parked.part(max_cells - cells, worth))
                except StoreError as error:
                    problem = str(error)
        seconds = time.monotonic() - begin
        return RestoreResult(cells=cells, seconds=seconds, missing=self.ledger.holes(), problem=problem)

    def _put_back(self, parked: Parked, part: Range) -> int:
        track = self.track
        positions = np.arange(parked.blob.start, parked.blob.stop)
        wanted = (positions >= part.start) & (positions < part.stop)
        cells: Cells = track.map.cells(parked.blob)
        track.map.touched(part)
        try:
            parked.store.get(parked.key, parked.tag, self._rows.chunks(cells, wanted))
        except StoreError:
            # Never load what is not what was saved. The tokens are known, so it can be recomputed.
            self._rows.fill(cells[wanted], 0)
            track.sequences.remove(Sequences.PARKED, parked.wanted.start, parked.wanted.stop)
            track.map.lose(parked.wanted)
            self._parking.forget(parked)
            self._release()
            raise
        track.sequences.move(Sequences.PARKED, Sequences.MAIN, part.start, part.stop)
        track.map.unpark(part)
        self._parking.drop(part)
        return part.cells

    def recompute(self, max_tokens: int) -> int:
        """Decode the first lost tokens again, at most `max_tokens`; gives how many. Changes the logits.

        None while spilled ones come before them, which have to be restored first. Fewer when somebody urgent
        came. Raises EngineError when their tokens are not known.
        """
        outermost = not self.guard.mine
        with self.guard.hold():
            self.track.catch_up()
            lost = next(self.ledger.ranges(LOST), None)
            if lost is None or self.ledger.holes(Range(0, lost.start)):
                return 0
            before = self.ledger.count(LOST)
            wanted = Range(lost.start, min(lost.stop, lost.start + max_tokens))
            self._decoding.again(wanted, interruptible=outermost)
            return before - self.ledger.count(LOST)

    def close(self) -> None:
        """Drop what waits in the store. Safe to call twice."""
        with self.guard.hold():
            self._parking.drop(Range(0, len(self.ledger)))
            self.track.distrust = "the model is closed"
