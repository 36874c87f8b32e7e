"""The engine for llama.cpp: any number of caches, behind an agent in this process or in another."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from psi_kv_governor.cache import (
    CacheState,
    Capabilities,
    Capability,
    Description,
    Kind,
    Plan,
    Recall,
    Recalled,
    Result,
    Snapshot,
    Step,
    Verb,
)
from psi_kv_governor.engines.llama.client import Client, Op, RegionInfo
from psi_kv_governor.engines.llama.evidence import LlamaEvidence, Sampling
from psi_kv_governor.engines.llama.recalls import recalled, settings_of
from psi_kv_governor.engines.llama.states import FIRST_ID, SavedStates
from psi_kv_governor.engines.llama.telling import (
    AFFECTED,
    LOST,
    MASKED,
    cache_state,
    elsewhere,
    result_of,
    saved_states,
    why_none,
)
from psi_kv_governor.errors import EngineError

_COUNT_EVERY_S = 1.0
"""Resident pages are counted so often: 0.3 ms for a gigabyte."""
_NOTHING_THROWN_AWAY = Capability(able=False, why="there is a place to park, so nothing is thrown away")
_OPS = {
    Verb.WRITE_BEHIND: Op.WRITE,
    Verb.RELEASE: Op.RELEASE,
    Verb.PARK: Op.PARK,
    Verb.MASK: Op.MASK,
    Verb.UNMASK: Op.UNMASK,
    Verb.UNPARK: Op.UNPARK,
    Verb.EVICT: Op.EVICT,
}


class LlamaEngine:
    """An `Engine` over the caches that one agent knows."""

    def __init__(
        self,
        client: Client,
        *,
        pid: int,
        place: str,
        backing: str,
        why_backing: str = "",
        context: Callable[[], int] | None = None,
    ) -> None:
        """With `context` only the caches of that llama_context (its address) are this engine's."""
        self.client = client
        self.head_cells = 0
        """First positions that hold the system prompt, where the front door knows them."""
        self.states: SavedStates | None = None
        """Those that the program saves in Python, where the front door has them."""
        self._pid = pid
        self._place = place
        self._backing = backing
        self._why_backing = why_backing
        self._context = context
        self._regions: dict[int, RegionInfo] = {}
        self._resident: dict[int, int] = {}
        self._frees_swap: set[int] = set()
        self._counted_s = -math.inf
        self._closed = False

    # -- telling ----------------------------------------------------------------------------------------

    def describe(self) -> Description:
        """See Engine."""
        regions = list(self._regions.values())
        able = Capability(able=True)
        away = [] if regions else self._away()
        none_yet = Capability(able=False, why=why_none(away))
        parks = bool(regions) or (bool(away) and self._knows_blobs)
        placeless = Capability(able=False, why="there is no place to park")
        no_blobs = Capability(able=False, why="states that are saved here are not known")
        by_cell = [region for region in regions if region.by_cell]
        mask = next((able for region in by_cell if region.maskable), none_yet)
        if not mask.able and by_cell:
            mask = Capability(able=False, why=by_cell[0].why_not_maskable)
        state = Capability(able=False, why="a recurrent state has no cells")
        of_cells = able if by_cell else state if regions else none_yet
        return Description(
            engine="llama",
            capabilities=Capabilities(
                release=of_cells,
                park=placeless if not self._place else able if parks else none_yet,
                mask=(mask if self._place else placeless) if by_cell or not regions else state,
                evict=_NOTHING_THROWN_AWAY if self._place else of_cells,
                blobs=placeless if not self._place else able if self._knows_blobs else no_blobs,
            ),
            backing=self._backing,
            place=self._place,
            details={"backing": self._why_backing} if self._why_backing else {},
        )

    def _away(self) -> list[str]:
        """Where caches are whose pages can't be returned."""
        try:
            return [] if self._closed else elsewhere(self.client.buffers())
        except EngineError:
            return []

    def snapshot(self) -> Snapshot:
        """See Engine."""
        now_s = time.monotonic()
        count = now_s - self._counted_s >= _COUNT_EVERY_S
        regions = self._look(count_resident=count)
        if count:
            self._resident = {region.id: region.resident for region in regions}
            self._frees_swap = {region.id for region in regions if region.frees_swap}
            self._counted_s = now_s
        largest = {
            region.context: max(r.rows for r in regions if r.context == region.context) for region in regions
        }
        caches = tuple(
            cache_state(
                self.client,
                region,
                pid=self._pid,
                now_s=now_s,
                most_rows=largest[region.context],
                resident_bytes=self._resident.get(region.id, 0),
                frees_swap=region.id in self._frees_swap,
                head_cells=self.head_cells,
            )
            for region in regions
        )
        written = max((region.written for region in regions), default=0)
        return Snapshot(time_s=now_s, caches=(*caches, *self._saved()), written_bytes=written)

    @property
    def _knows_blobs(self) -> bool:
        return self._context is None or self.states is not None

    def _saved(self) -> tuple[CacheState, ...]:
        blobs = self.client.blobs() if self._context is None else []
        return saved_states(self._pid, blobs, () if self.states is None else self.states.blobs())

    def _look(self, *, count_resident: bool = False) -> list[RegionInfo]:
        if self._closed:
            raise EngineError("the engine is closed")
        wanted = self._context() if self._context is not None else None
        regions = [
            region
            for region in self.client.regions(count_resident=count_resident)
            if wanted is None or region.context == wanted
        ]
        self._regions = {region.id: region for region in regions}
        return regions

    # -- acting -----------------------------------------------------------------------------------------

    def apply(self, plan: Plan) -> Result:
        """See Engine."""
        begin_s = time.monotonic()
        total, marked = Result(), False
        for number, step in enumerate(plan.steps):
            left_s = plan.deadline_s - (time.monotonic() - begin_s)
            left_bytes = (
                math.inf
                if plan.max_bytes is None
                else plan.max_bytes - total.bytes_returned - total.bytes_back
            )
            masks = step.verb is Verb.MASK
            if left_s <= 0.0 or (left_bytes <= 0 and not (masks and marked)):  # what is masked goes as well
                total = msgspec.structs.replace(total, done=False)
                break
            if masks and not marked:
                total, marked = total.plus(self._mark(plan.steps[number:])), True
            total = total.plus(self._step(step, left_s, left_bytes))
            self._counted_s = -math.inf  # the next look counts what is there now
        return msgspec.structs.replace(total, seconds=time.monotonic() - begin_s)

    def _mark(self, steps: Sequence[Step]) -> Result:
        """Mask all that is to be masked before any of it is parked: what the running graph still reads goes
        when it is over, and one after the other each sequence would wait for a graph of its own."""
        total = Result()
        masks = [step for step in steps if step.verb is Verb.MASK and step.sequence is not None]
        for step in masks if len(masks) > 1 else ():
            reply = self.client.ask(Op.MARK, step.cache, step.sequence or 0, ranges=step.ranges)
            total = total.plus(Result(masked=reply.masked))
        return total

    def _step(self, step: Step, left_s: float, left_bytes: float) -> Result:
        if step.blob is not None and step.blob >= FIRST_ID and self.states is not None:
            return self.states.park(step.blob)
        if step.blob is not None and step.verb in {Verb.PARK, Verb.WRITE_BEHIND}:
            kept = int(step.verb is Verb.WRITE_BEHIND)
            return result_of(self.client.ask(Op.PARK_BLOB, step.blob, flags=kept), step.verb)
        if step.verb is Verb.EVICT and self._place:
            return Result(problem=_NOTHING_THROWN_AWAY.why)
        op = _OPS.get(step.verb)
        if op is None or step.blob is not None:
            return Result(problem=f"llama.cpp's caches can't do this: {step.verb.value}")
        reply = self.client.ask(
            op,
            step.cache,
            -1 if step.sequence is None else step.sequence,
            ranges=step.ranges,
            deadline_s=0.0 if math.isinf(left_s) else left_s,
            max_bytes=0 if math.isinf(left_bytes) else max(1, int(left_bytes)),
        )
        result = result_of(reply, step.verb)
        if op is Op.PARK and step.sequence is not None and self._all_idle(step):
            # Nobody reads this cache now: what does not lie cell by cell (a transposed V) can go as well.
            rest = self.client.ask(op, step.cache, -1, deadline_s=0.0 if math.isinf(left_s) else left_s)
            result = result.plus(msgspec.structs.replace(result_of(rest, step.verb), cells=0))
        return result

    def _all_idle(self, step: Step) -> bool:
        region = self._regions.get(step.cache)
        return (
            region is not None
            and not region.computing
            and not step.ranges
            and all(s.id == step.sequence or s.parked == s.cells for s in region.sequences)
        )

    def collect(self, kinds: frozenset[Kind], sampling: Sampling | None = None) -> None:
        """See Engine. How attention is sampled holds for caches whose first graph has not run yet."""
        s = sampling or Sampling()
        every = s.every if kinds & {"attention", "last_used"} else 0
        self.client.ask(Op.COLLECT, ranges=((every, s.window), (s.near, s.layers), (s.half_life, 0)))

    def evidence(self, cache: int, sequence: int) -> LlamaEvidence:
        """See Engine."""
        if cache not in self._regions:
            self._look()
        region = self._regions.get(cache)
        if region is None:
            raise EngineError(f"there is no cache {cache} any more")
        return LlamaEvidence(self.client, region, sequence)

    def first_affected(self, sequence: int) -> int | None:
        """The first position that was evicted, or decoded while others were masked or gone; None where there
        is none."""
        firsts = [c[(c[:, 1] & (AFFECTED | LOST)) != 0, 0] for c in self._cells_of(sequence)]
        return min((int(found.min()) for found in firsts if len(found)), default=None)

    def masked(self, sequence: int) -> int:
        """Positions of the sequence that attention passes over now."""
        return max((int(np.count_nonzero(c[:, 1] & MASKED)) for c in self._cells_of(sequence)), default=0)

    def _cells_of(self, sequence: int) -> list[npt.NDArray[np.int32]]:
        regions = self._look()
        return [
            self.client.cells(region.id, sequence)
            for region in regions
            if region.by_cell and (region.affected or region.masked or any(s.lost for s in region.sequences))
        ]

    def recall(self, settings: Recall) -> None:
        """Exchange parked cells for live ones by itself, as `settings` say, until told otherwise."""
        self.client.ask(Op.RECALL, ranges=settings_of(settings))

    def recalled(self) -> Recalled:
        """What it did so far. Raises EngineError."""
        regions = [region for region in self._look() if region.by_cell]
        if not regions:
            return Recalled(why_not="no cache is open")
        largest = max(regions, key=lambda region: region.rows)
        return recalled(self.client.ask(Op.RECALLED, largest.id).payload)

    def refuse_blobs(self, refuse: bool) -> None:
        """Have the program's own prompt cache shrink instead of growing, until told otherwise."""
        self.client.ask(Op.REFUSE, flags=int(refuse))

    def close(self) -> None:
        """See Engine."""
        if self._closed:
            return
        try:
            for region in self._look():
                self.client.ask(Op.FORGET, region.id)
        except EngineError:
            pass  # the agent is gone, and its masks with it
        self._closed = True
