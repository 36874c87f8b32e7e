"""The engine for a context whose pages can't be returned: what is given up makes it smaller."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from psi_kv_governor.cache import (
    CacheState,
    Capabilities,
    Capability,
    Description,
    Domain,
    Evidence,
    Kind,
    Plan,
    Range,
    Result,
    SequenceState,
    Snapshot,
    Values,
    cells_in,
)
from psi_kv_governor.engines.llama.resize.change import Change
from psi_kv_governor.engines.llama.resize.context import ResizableContext
from psi_kv_governor.errors import EngineError

_RUNNING_S = 1.0
_PATIENCE_S = 10.0
"""How long an order waits for the end of a decode: a batch of 512 took 6 s on the slowest device."""
_CACHE = 1


class ResizingEngine:
    """An `Engine` over one context of `GovernedLlama`."""

    def __init__(
        self,
        context: ResizableContext,
        *,
        place: str,
        device: str,
        domain: Domain,
        free_bytes: Callable[[], int],
    ) -> None:
        """`device` is llama.cpp's name of the memory, `domain` whose it is, `free_bytes` what is free of it
        (0: not told)."""
        self.head_cells = 0
        """First positions that hold the system prompt, where the front door knows them."""
        self._context = context
        self._place = place
        self._device = device
        self._domain = domain
        self._free_bytes = free_bytes
        self._closed = False

    # -- telling ----------------------------------------------------------------------------------------

    def describe(self) -> Description:
        """See Engine."""
        pinned = self._context.why_pinned
        able = Capability(able=not pinned, why=f"its size stays as it is: {pinned}" if pinned else "")
        placeless = Capability(able=False, why="there is no place to park")
        to_files = able if self._place else placeless
        return Description(
            engine="llama",
            capabilities=Capabilities(
                release=to_files,
                park=to_files,
                mask=to_files,
                blobs=Capability(able=False, why="saved states are parked under psi-kv exec"),
            ),
            domain=self._domain,
            place=self._place,
            details={"backing": f"in {self._device}, where only whole buffers can be freed: {self._when()}"},
        )

    def _when(self) -> str:
        if self._domain is Domain.DEVICE:
            return "it is made smaller by hand only, since what is free there is no help to the machine"
        return "it is made smaller"

    def snapshot(self) -> Snapshot:
        """See Engine."""
        if self._closed:
            raise EngineError("the engine is closed")
        resizer = self._context.resizer
        cell_bytes, pieces = resizer.cell_bytes, resizer.pieces
        live = resizer.live(parked=True)
        parked = sum(piece.part.cells for piece in pieces if not piece.masked)
        sequence = SequenceState(
            id=0,
            next_position=resizer.end,
            live=tuple(live),
            masked=tuple(piece.part for piece in pieces if piece.masked),
            affected=self._affected(),
            parked_bytes=parked * cell_bytes,
            running=self._running(),
            last_used_s=self._context.decoded_s,
            head_cells=self.head_cells,
        )
        fits = resizer.sizes.for_cells(cells_in(live) - parked)
        cache = CacheState(
            id=_CACHE,
            name="keys and values",
            pid=os.getpid(),
            capacity_cells=resizer.sizes.logical,
            cell_bytes=cell_bytes,
            row_bytes=cell_bytes,
            resident_bytes=resizer.cells * cell_bytes if resizer.pointer is not None else 0,
            maskable=True,
            free_resident_bytes=max(0, resizer.cells - fits) * cell_bytes,
            rebuilt=True,
            sequences=(sequence,) if resizer.end else (),
        )
        return Snapshot(time_s=time.monotonic(), caches=(cache,))

    def _running(self) -> bool:
        return self._context.decoding or time.monotonic() - self._context.decoded_s < _RUNNING_S

    def _affected(self) -> int:
        first = self._context.affected_from
        return 0 if first is None else max(0, self._context.resizer.end - first)

    def first_affected(self, sequence: int) -> int | None:
        """The first position that was decoded while others were masked; None where there is none."""
        return self._context.affected_from if sequence == 0 else None

    def masked(self, sequence: int) -> int:
        """Positions of the sequence that attention passes over now."""
        pieces = self._context.resizer.pieces if sequence == 0 else ()
        return sum(piece.part.cells for piece in pieces if piece.masked)

    # -- acting -----------------------------------------------------------------------------------------

    def apply(self, plan: Plan) -> Result:
        """See Engine. All steps are one change of size."""
        begin_s = time.monotonic()
        if self._closed:
            raise EngineError("the engine is closed")
        change = Change(self._context, plan)
        if change.empty:
            return Result(problem=change.problem)
        before = self._measured()
        try:
            done = self._context.order(change.carry_out, min(plan.deadline_s, _PATIENCE_S))
        except EngineError as error:
            return Result(problem=str(error), seconds=time.monotonic() - begin_s)
        if not done:
            return Result(done=False, seconds=time.monotonic() - begin_s)
        after = self._measured()
        return change.result(_freed(before, after, change.computed_bytes), time.monotonic() - begin_s)

    def _measured(self) -> tuple[int, int]:
        """Resident bytes of this process, and what is free of the device."""
        return _resident_bytes(), self._free_bytes()

    def collect(self, kinds: frozenset[Kind]) -> None:
        """See Engine."""

    def evidence(self, cache: int, sequence: int) -> Evidence:
        """See Engine. Nothing of a device's rows can be read."""
        del cache, sequence
        return _NoEvidence()

    def close(self) -> None:
        """See Engine."""
        if not self._closed:
            self._context.pin("the governor is closed")
        self._closed = True


def _freed(before: tuple[int, int], after: tuple[int, int], computed_bytes: int) -> int:
    """Bytes that went (negative: came): by the kernel where the device's memory is this process's, else by
    what the device says is free."""
    resident, free = before[0] - after[0], after[1] - before[1]
    return resident if abs(resident) * 2 >= abs(computed_bytes) or not free else free


def _resident_bytes() -> int:
    """Of this process; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0


class _NoEvidence:
    """`Evidence` of rows that nobody can read: they came in the order of their positions."""

    def why_not(self, kind: Kind) -> str:
        """See Evidence."""
        return "" if kind == "arrivals" else "rows in memory of a device can't be read"

    def arrivals(self, part: Range) -> Values:
        """See Evidence."""
        return np.arange(part.start, part.stop, dtype=np.float64)

    def _unknown(self, part: Range) -> Values:
        return np.full(part.cells, np.nan)

    key_norms = key_diffs = attention = last_used = demand = _unknown
