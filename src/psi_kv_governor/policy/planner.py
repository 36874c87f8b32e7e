"""From bytes to a plan: the ladder over all caches of an engine, and the policy on its last rung."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from psi_kv_governor.cache import (
    BlobState,
    CacheState,
    Capabilities,
    Engine,
    Evidence,
    Plan,
    Range,
    SequenceState,
    Snapshot,
    Step,
    Verb,
    cells_in,
    merged,
    without,
)
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import SLICE_BYTES, CacheSnapshot
from psi_kv_governor.errors import BadInputError, EngineError
from psi_kv_governor.policy.base import Policy
from psi_kv_governor.policy.registry import POLICIES
from psi_kv_governor.policy.select import Protection, Scored, head_of, score, why_nothing
from psi_kv_governor.policy.window import Window

LEAST_PAGES = 6
"""Pages that a lone block fills in the tensor with the shortest rows. A block that begins and ends within a
page keeps the whole of both: of six pages one in the mean, so five sixths of the bytes come free."""
MOST_BLOCKS = 256
"""Blocks of a full context: each may be a mapping of its own in every layer, and a process has 65,530."""
SLICE_S = 0.05
"""Longest that one slice of a restore takes before the machine is looked at again."""
_LEAST_RELEASE_BYTES = 1 << 20
"""Fewer resident bytes of free cells are not worth asking llama.cpp for: a trim returns more."""


def why_not_served(policy: Policy | type[Policy], evidence: Evidence) -> str:
    """Why the cache can't give what the policy needs; '' where it can."""
    return next(filter(None, map(evidence.why_not, sorted(policy.needs))), "")


def check_served(policy: Policy, evidence: Evidence) -> None:
    """Raises BadInputError when the cache can't give what the policy needs, naming what can be used."""
    if why := why_not_served(policy, evidence):
        served = [name for name, other in POLICIES.items() if not why_not_served(other, evidence)]
        raise BadInputError(
            f"the policy {policy.name} can't be used with this cache: {why}; use {', '.join(served)}"
        )


def block_size(policy: Policy, block_cells: int, row_bytes: int, capacity: int) -> int:
    """Cells of a block: the least multiple of `block_cells` with which LEAST_PAGES and MOST_BLOCKS hold.

    `row_bytes` are those of the shortest row, `capacity` the cells of the whole context. A policy whose
    blocks lie side by side keeps `block_cells`.
    """
    if not policy.scattered:
        return block_cells
    least = max(block_cells, -(-LEAST_PAGES * mmap.PAGESIZE // row_bytes), -(-capacity // MOST_BLOCKS))
    return -(-least // block_cells) * block_cells


class _Rung(NamedTuple):
    """Something that can be given up, and where it is."""

    cache: CacheState
    n_bytes: int
    sequence: SequenceState | None = None
    blob: BlobState | None = None

    @property
    def used_s(self) -> float:
        if self.blob is not None:
            return self.blob.last_used_s
        return self.sequence.last_used_s if self.sequence is not None else 0.0


class Planner:
    """Makes plans for one engine, and remembers what the policy thought of each position.

    A policy that fails is somebody's mistake and no reason to be killed for want of memory: the oldest
    blocks go then, and `complain` is told why.
    """

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        config: GovernorConfig,
        complain: Callable[[str], None] = lambda why: None,
    ) -> None:
        self.policy = policy
        self.marked: dict[int | None, tuple[Range, ...]] = {}
        """What the caller protects, by sequence (None: in each): positions, whatever is decoded there."""
        self._engine = engine
        self._config = config
        self._complain = complain
        self._scores: dict[tuple[int, int], npt.NDArray[np.float64]] = {}

    # -- what there is ----------------------------------------------------------------------------------

    def holdings(self, snapshot: Snapshot) -> CacheSnapshot:
        """The caches as the law sees them."""
        able = self._engine.describe().capabilities
        lossless = sum(rung.n_bytes for rung in self._lossless(snapshot, able))
        lossy = sum(rung.n_bytes for rung in self._running(snapshot)) if self._lossy_verb(able) else 0
        sequences = [(cache, s) for cache in snapshot.caches for s in cache.sequences]
        steps = [self._config.block_cells * cache.cell_bytes for cache, _ in sequences if cache.maskable]
        return CacheSnapshot(
            live_bytes=sum(s.live_cells * cache.cell_bytes for cache, s in sequences)
            + sum(blob.n_bytes for cache in snapshot.caches for blob in cache.blobs),
            masked_bytes=sum(s.masked_cells * cache.cell_bytes for cache, s in sequences),
            lost_bytes=sum(s.lost_cells * cache.cell_bytes for cache, s in sequences),
            trimmable_bytes=lossless + lossy,
            lossless_bytes=lossless,
            step_bytes=min(steps, default=_LEAST_RELEASE_BYTES),
            last_used_s=max((s.last_used_s for _, s in sequences), default=0.0),
        )

    def _lossy_verb(self, able: Capabilities) -> Verb | None:
        """How cells of running sequences go here: content is dropped only where it was allowed, and there is
        no place to park. None where they can't go."""
        if able.park.able:
            return Verb.MASK if able.mask.able else None
        return Verb.EVICT if self._config.evict and able.evict.able else None

    def _lossless(self, snapshot: Snapshot, able: Capabilities) -> Iterator[_Rung]:
        """What costs no fidelity, in the order of the ladder."""
        if able.release.able:
            yield from _free(snapshot)
        blobs = [
            _Rung(cache, blob.n_bytes, blob=blob)
            for cache in (snapshot.caches if able.blobs.able else ())
            for blob in cache.blobs
            if not blob.parked
        ]
        idle = [
            _Rung(cache, n_bytes, sequence=sequence)
            for cache in (snapshot.caches if able.park.able else ())
            for sequence in cache.sequences
            if not sequence.running
            and (n_bytes := sequence.live_cells * cache.cell_bytes - sequence.parked_bytes) > 0
        ]
        yield from sorted(blobs, key=lambda rung: rung.used_s)
        yield from sorted(idle, key=lambda rung: rung.used_s)

    def _running(self, snapshot: Snapshot) -> Iterator[_Rung]:
        """Running sequences whose parked cells can be masked, with what may go of each above its floor."""
        for cache in snapshot.caches:
            for sequence in cache.sequences if cache.maskable else ():
                cells = self._may_go(sequence)
                if sequence.running and cells >= self._config.block_cells:
                    yield _Rung(cache, cells * cache.cell_bytes, sequence=sequence)

    def _floor(self, sequence: SequenceState) -> int:
        return max(self._config.floor_cells, math.ceil(self._config.floor_share * sequence.next_position))

    def _may_go(self, sequence: SequenceState) -> int:
        free = cells_in(self._protection(sequence).free(sequence.live, sequence.next_position))
        return min(free, sequence.live_cells - self._floor(sequence))

    def _protection(self, sequence: SequenceState) -> Protection:
        head = head_of(sequence.head_cells, sequence.next_position, self._config.head_share)
        marked = (*self.marked.get(None, ()), *self.marked.get(sequence.id, ()))
        return Protection(
            sink_cells=max(self._config.sink_cells, head),
            window_cells=self._config.window_cells,
            marked=marked,
        )

    def protect(self, positions: Range, sequence: int | None) -> None:
        """Never give up `positions` of `sequence` (None: of each) until `unprotect`."""
        self.marked[sequence] = (*self.marked.get(sequence, ()), positions)

    def unprotect(self, positions: Range, sequence: int | None) -> None:
        """Take the caller's protection off `positions`; without a sequence off those of each."""
        for one in [sequence] if sequence is not None else list(self.marked):
            left = self.marked.get(one, ())
            self.marked[one] = tuple(rest for mark in left for rest in without(mark, positions))

    # -- giving up --------------------------------------------------------------------------------------

    def trim(self, snapshot: Snapshot, n_bytes: int, *, urgent: bool = False) -> Plan:
        """The plan that gives up `n_bytes`, rounded up to whole blocks: what costs nothing first."""
        able = self._engine.describe().capabilities
        steps: list[Step] = []
        left = n_bytes
        for rung in self._lossless(snapshot, able):
            if left <= 0:
                break
            steps.append(self._step(rung, left))
            left -= rung.n_bytes
        if left > 0 and (verb := self._lossy_verb(able)):
            steps += self._of_running(snapshot, left, verb)
        return Plan(steps=tuple(steps), urgent=urgent)

    def _step(self, rung: _Rung, n_bytes: int) -> Step:
        if rung.blob is not None:
            return Step(verb=Verb.PARK, cache=rung.cache.id, blob=rung.blob.id)
        if rung.sequence is None:
            return Step(verb=Verb.RELEASE, cache=rung.cache.id)
        ranges: tuple[Range, ...] = ()
        if n_bytes < rung.n_bytes:  # its oldest part; what is parked already of it costs nothing to name
            block = self._config.block_cells
            parked = rung.sequence.parked_bytes // rung.cache.cell_bytes
            cells = -(-(parked + -(-n_bytes // rung.cache.cell_bytes)) // block) * block
            ranges = tuple(_first(rung.sequence.live, cells))
        return Step(verb=Verb.PARK, cache=rung.cache.id, sequence=rung.sequence.id, ranges=ranges)

    def _of_running(self, snapshot: Snapshot, n_bytes: int, verb: Verb) -> list[Step]:
        """Ranges of running sequences, each giving its share, by the policy's scores. Whole blocks are
        chosen, so later ones give what is left: together they exceed `n_bytes` by one block at the most."""
        self._forget(snapshot)
        rungs = list(self._running(snapshot))
        total = sum(rung.n_bytes for rung in rungs)
        left = n_bytes
        steps = []
        for rung in rungs:
            wanted = min(rung.n_bytes, -(-n_bytes * rung.n_bytes // total), left)
            if wanted <= 0 or rung.sequence is None:
                continue
            try:
                ranges = self._choose(rung, -(-wanted // rung.cache.cell_bytes))
            except EngineError:  # it ended since the snapshot: the others give all the same
                continue
            left -= cells_in(ranges) * rung.cache.cell_bytes
            if ranges:
                step = Step(verb=verb, cache=rung.cache.id, sequence=rung.sequence.id, ranges=tuple(ranges))
                steps.append(step)
        return steps

    def _forget(self, snapshot: Snapshot) -> None:
        """What was thought of sequences that are gone."""
        there = {(cache.id, sequence.id) for cache in snapshot.caches for sequence in cache.sequences}
        for key in self._scores.keys() - there:
            del self._scores[key]

    def _choose(self, rung: _Rung, cells: int) -> list[Range]:
        """So many cells in whole blocks, the lowest scores first; never more than may go."""
        assert rung.sequence is not None
        block = self._config.block_cells
        most = self._may_go(rung.sequence)
        cells = min(-(-cells // block) * block, most)
        scored = self._score(rung.cache, rung.sequence)
        known = self._worth(rung.cache, rung.sequence)
        for part, worth in zip(scored.blocks, scored.scores, strict=True):
            known[part.start : part.stop] = worth
        return scored.lowest(cells, cells)

    def _score(self, cache: CacheState, sequence: SequenceState) -> Scored:
        evidence: Evidence | None = None
        try:
            evidence = self._engine.evidence(cache.id, sequence.id)
            policy = self.policy
            if why := why_not_served(policy, evidence):
                self._complain(f"the policy {policy.name} can't be used with this cache ({why})")
                policy = Window()
            return self._scored_by(policy, cache, sequence, evidence)
        except EngineError:
            raise
        except Exception as error:
            self._complain(f"the policy {self.policy.name} failed ({error}): the oldest blocks go instead")
            return self._scored_by(Window(), cache, sequence, evidence)

    def _scored_by(
        self, policy: Policy, cache: CacheState, sequence: SequenceState, evidence: Evidence | None
    ) -> Scored:
        return score(
            policy,
            list(sequence.live),
            sequence.next_position,
            cast(Evidence, evidence),  # the window asks for none
            protection=self._protection(sequence),
            block_cells=block_size(policy, self._config.block_cells, cache.row_bytes, cache.capacity_cells),
        )

    def _worth(self, cache: CacheState, sequence: SequenceState) -> npt.NDArray[np.float64]:
        """What was last thought of each position; -inf where nothing was."""
        key = (cache.id, sequence.id)
        known = self._scores.get(key)
        if known is None or len(known) < sequence.next_position:
            longer = np.full(max(1024, 2 * sequence.next_position), -np.inf)
            if known is not None:
                longer[: len(known)] = known
            self._scores[key] = known = longer
        return known

    def why_nothing(self, snapshot: Snapshot) -> str:
        """Why a trim gives nothing, in one clause."""
        able = self._engine.describe().capabilities
        if self._lossy_verb(able) is None:
            return able.mask.why if able.park.able else able.park.why
        for cache in snapshot.caches:
            for sequence in cache.sequences:
                if not cache.maskable:
                    return cache.why_not_maskable
                if why := why_nothing(
                    sequence.live, sequence.next_position, self._protection(sequence), self._floor(sequence)
                ):
                    return why
        return "the cache is empty" if not any(cache.sequences for cache in snapshot.caches) else ""

    # -- back again, and beforehand ---------------------------------------------------------------------

    def restore(self, snapshot: Snapshot, n_bytes: int) -> Plan:
        """A slice of what is masked, what scored highest first."""
        self._forget(snapshot)
        wanted: list[tuple[float, Step, int]] = []
        for cache in snapshot.caches:
            for sequence in cache.sequences:
                known = self._worth(cache, sequence)
                for part in _blocks(sequence.masked, self._config.block_cells):
                    step = Step(verb=Verb.UNMASK, cache=cache.id, sequence=sequence.id, ranges=(part,))
                    worth = float(known[part.start : part.stop].mean())
                    wanted.append((worth, step, part.cells * cache.cell_bytes))
        wanted.sort(key=lambda one: -one[0])
        chosen: list[Step] = []
        slice_bytes = min(n_bytes, SLICE_BYTES)
        for _, step, step_bytes in wanted:
            if slice_bytes <= 0:
                break
            slice_bytes -= step_bytes
            chosen.append(step)
        return Plan(
            steps=tuple(_joined(chosen)), deadline_s=SLICE_S, max_bytes=max(1, min(n_bytes, SLICE_BYTES))
        )

    def release(self, snapshot: Snapshot) -> Plan | None:
        """Return what free cells hold, where it is worth a look."""
        if not self._engine.describe().capabilities.release.able:
            return None
        rungs = [rung for rung in _free(snapshot) if rung.n_bytes >= _LEAST_RELEASE_BYTES]
        steps = tuple(Step(verb=Verb.RELEASE, cache=rung.cache.id) for rung in rungs)
        return Plan(steps=steps) if steps else None

    def write_behind(self, snapshot: Snapshot) -> Plan | None:
        """Write what is dirty while the machine is merely busy; saved states are parked as they are whole."""
        if not self._engine.describe().capabilities.park.able:
            return None
        steps = [
            Step(verb=Verb.WRITE_BEHIND, cache=cache.id, sequence=sequence.id, ranges=ranges)
            for cache in snapshot.caches
            for sequence in cache.sequences
            if (ranges := tuple(self._protection(sequence).free(sequence.live, sequence.next_position)))
        ]
        return Plan(steps=tuple(steps), deadline_s=SLICE_S) if steps else None

    def park_blobs(self, snapshot: Snapshot) -> Plan | None:
        """Saved states are parked as soon as they are whole: they are read only when they are loaded."""
        if not self._engine.describe().capabilities.blobs.able:
            return None
        steps = tuple(
            Step(verb=Verb.PARK, cache=cache.id, blob=blob.id)
            for cache in snapshot.caches
            for blob in cache.blobs
            if not blob.parked
        )
        return Plan(steps=steps) if steps else None


def _free(snapshot: Snapshot) -> Iterator[_Rung]:
    for cache in snapshot.caches:
        if cache.free_resident_bytes > 0:
            yield _Rung(cache, cache.free_resident_bytes)


def _first(live: tuple[Range, ...], cells: int) -> Iterator[Range]:
    for part in live:
        if cells <= 0:
            return
        yield Range(part.start, min(part.stop, part.start + cells))
        cells -= part.cells


def _blocks(ranges: tuple[Range, ...], block_cells: int) -> Iterator[Range]:
    for part in ranges:
        for start in range(part.start, part.stop, block_cells):
            yield Range(start, min(start + block_cells, part.stop))


def _joined(steps: list[Step]) -> Iterator[Step]:
    """Steps of the same sequence as one, in the order in which sequences come first."""
    by_sequence: dict[tuple[int, int | None], list[Range]] = {}
    for step in steps:
        by_sequence.setdefault((step.cache, step.sequence), []).extend(step.ranges)
    for (cache, sequence), ranges in by_sequence.items():
        yield Step(verb=Verb.UNMASK, cache=cache, sequence=sequence, ranges=tuple(merged(ranges)))
