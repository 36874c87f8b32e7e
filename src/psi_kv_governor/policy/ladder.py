"""What the caches of an engine can give up, the cheapest first: the rungs of the ladder, and what is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from psi_kv_governor.cache import (
    BlobState,
    CacheState,
    Description,
    Range,
    SequenceState,
    Snapshot,
    Verb,
    cells_in,
)
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control.decision import CacheSnapshot
from psi_kv_governor.policy.select import Protection, head_of, why_nothing

Marks = Mapping[int | None, tuple[Range, ...]]
"""What the caller protects, by sequence (None: in each): positions, whatever is decoded there."""

LEAST_RELEASE_BYTES = 1 << 20
"""Fewer resident bytes of free cells are not worth asking for: a trim returns more."""


class Rung(NamedTuple):
    """Something that can be given up: one step, or part of one."""

    verb: Verb
    cache: CacheState
    n_bytes: int
    """Resident bytes that it returns at the most."""
    sequence: SequenceState | None = None
    blob: BlobState | None = None

    @property
    def used_s(self) -> float:
        """When it was last used; 0 for what nobody uses."""
        used = self.blob or self.sequence
        return 0.0 if used is None else used.last_used_s


class Ladder:
    """The rungs of one snapshot, for an engine that is as `description` says."""

    def __init__(
        self, snapshot: Snapshot, description: Description, config: GovernorConfig, marks: Marks | None = None
    ) -> None:
        self.snapshot, self.description, self.config = snapshot, description, config
        self.marks: Marks = marks or {}
        able = description.capabilities
        self.parks = able.park.able
        """Whether there is a place for what is given up."""
        self.evicts = able.evict.able and not self.parks and (config.evict or not description.place)
        """Whether content is dropped: never where it could be parked; where a place was found but can't be
        used, only when the configuration says so."""
        free: list[Rung] = []
        blobs: list[Rung] = []
        idle: list[Rung] = []
        lossy: list[Rung] = []
        preempting: list[Rung] = []
        for cache in snapshot.caches:
            if able.release.able and cache.free_resident_bytes > 0:
                free.append(Rung(Verb.RELEASE, cache, cache.free_resident_bytes))
            if self.parks and able.blobs.able and cache.blobs:
                blobs += _blobs(cache)
            for one in cache.sequences:
                if self.parks and not one.running:
                    idle += _idle(cache, one)
                elif self.parks and able.mask.able and one.preempt_order is not None:
                    preempting += _preempting(cache, one)
                lossy += self._lossy(cache, one)
        self.lossless: tuple[Rung, ...] = (*free, *_by_use(blobs), *_by_use(idle))
        """What costs no fidelity: pages of free cells, then blobs, then idle sequences. Of the latter two the
        least recently used first, whichever cache they are in."""
        self.lossy: tuple[Rung, ...] = tuple(sorted(_by_use(lossy), key=_runs))
        """What costs fidelity: ranges of running sequences to be masked, or of any to be evicted. Idle ones
        first, then the least recently used."""
        self.preempting: tuple[Rung, ...] = tuple(sorted(preempting, key=_preempt_order))
        """Running sequences that can be made to stand still, whole: only where memory is about to be gone. No
        fidelity is lost, but somebody waits."""

    def holdings(self) -> CacheSnapshot:
        """The caches as the law sees them."""
        live, masked, lost, last_used_s = 0, 0, 0, 0.0
        steps = []
        for cache in self.snapshot.caches:
            size = cache.cell_bytes
            for blob in cache.blobs:
                live += blob.n_bytes
            for one in cache.sequences:
                live += one.live_cells * size
                masked += one.masked_cells * size
                lost += one.lost_cells * size
                last_used_s = max(last_used_s, one.last_used_s)
            if cache.sequences and (cache.maskable or self.evicts):
                steps.append(self.config.block_cells * size)
        lossless = _bytes_of(self.lossless)
        return CacheSnapshot(
            live_bytes=live,
            masked_bytes=masked,
            lost_bytes=lost,
            trimmable_bytes=lossless + _bytes_of(self.lossy) + _bytes_of(self.preempting),
            lossless_bytes=lossless,
            step_bytes=min(steps, default=LEAST_RELEASE_BYTES),
            last_used_s=last_used_s,
        )

    def _lossy(self, cache: CacheState, one: SequenceState) -> list[Rung]:
        """A sequence that can give ranges. All of its cells count, resident or not: the next token reads
        what attention looks at."""
        masks = self.parks and self.description.capabilities.mask.able and cache.maskable and one.running
        evicts = self.evicts and cache.evictable
        cells = self.may_go(one) if evicts or masks else 0
        # Less than a block would make each token that is decoded at the floor a trim of its own.
        if cells < self.config.block_cells:
            return []
        verb = Verb.EVICT if evicts else Verb.MASK
        return [Rung(verb, cache, cells * cache.cell_bytes, sequence=one)]

    # -- what is kept -----------------------------------------------------------------------------------

    def protection(self, sequence: SequenceState) -> Protection:
        """The positions of `sequence` that no policy may give up."""
        head = head_of(sequence.head_cells, sequence.next_position, self.config.head_share)
        return Protection(
            sink_cells=max(self.config.sink_cells, head),
            window_cells=self.config.window_cells,
            marked=(*self.marks.get(None, ()), *self.marks.get(sequence.id, ())),
        )

    def floor(self, sequence: SequenceState) -> int:
        """Cells of `sequence` that stay live whatever the pressure says."""
        context = sequence.live_cells + sequence.masked_cells + sequence.lost_cells
        return max(self.config.floor_cells, math.ceil(self.config.floor_share * context))

    def may_go(self, sequence: SequenceState) -> int:
        """Live cells of `sequence` outside protection and above the floor."""
        above = sequence.live_cells - self.floor(sequence)
        if above <= 0:
            return 0
        return min(above, cells_in(self.protection(sequence).free(sequence.live, sequence.next_position)))

    def why_nothing(self) -> str:
        """Why nothing can be given up, in one clause; '' where something can."""
        if self.lossless or self.lossy or self.preempting:
            return ""
        if not any(cache.sequences or cache.blobs for cache in self.snapshot.caches):
            return "the cache is empty"
        if not self.parks and not self.evicts:
            return self.description.capabilities.park.why or "there is no place to park"
        giving = [
            (cache, one)
            for cache in self.snapshot.caches
            for one in cache.sequences
            if one.running or self.evicts
        ]
        if not giving:
            return "all that can be parked is parked already"
        return next(filter(None, (self._why_not_lossy(*one) for one in giving)), "") or (
            f"less than a block of {self.config.block_cells} cells is left above the floor"
        )

    def _why_not_lossy(self, cache: CacheState, sequence: SequenceState) -> str:
        mask = self.description.capabilities.mask
        if not self.evicts and not (mask.able and cache.maskable):
            return cache.why_not_maskable or mask.why or "what is being decoded can't be masked here"
        protection, floor = self.protection(sequence), self.floor(sequence)
        return why_nothing(sequence.live, sequence.next_position, protection, floor)


def _blobs(cache: CacheState) -> list[Rung]:
    return [
        Rung(Verb.PARK, cache, blob.n_bytes, blob=blob)
        for blob in cache.blobs
        if not blob.parked and blob.n_bytes > 0
    ]


def _idle(cache: CacheState, one: SequenceState) -> list[Rung]:
    """A sequence that is not being decoded, with what is resident of it."""
    n_bytes = one.live_cells * cache.cell_bytes - one.parked_bytes
    return [Rung(Verb.PARK, cache, n_bytes, sequence=one)] if n_bytes > 0 else []


def _preempting(cache: CacheState, one: SequenceState) -> list[Rung]:
    cells = one.live_cells
    return [Rung(Verb.MASK, cache, cells * cache.cell_bytes, sequence=one)] if cells else []


def _preempt_order(rung: Rung) -> int:
    return (rung.sequence and rung.sequence.preempt_order) or 0


def _by_use(rungs: list[Rung]) -> list[Rung]:
    return sorted(rungs, key=lambda rung: rung.used_s)


def _bytes_of(rungs: Sequence[Rung]) -> int:
    return sum(rung.n_bytes for rung in rungs)


def _runs(rung: Rung) -> bool:
    return rung.sequence is not None and rung.sequence.running
