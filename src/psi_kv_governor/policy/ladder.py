"""What the caches of an engine can give up, the cheapest first: the rungs of the ladder, and what is kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
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


@dataclass(frozen=True)
class Ladder:
    """The rungs of one snapshot, for an engine that is as `description` says."""

    snapshot: Snapshot
    description: Description
    config: GovernorConfig
    marks: Marks = field(default_factory=dict)

    @property
    def parks(self) -> bool:
        """Whether there is a place for what is given up."""
        return self.description.capabilities.park.able

    @property
    def evicts(self) -> bool:
        """Whether content is dropped: never where it could be parked; where a place was found but can't be
        used, only when the configuration says so."""
        able = self.description.capabilities.evict.able and not self.parks
        return able and (self.config.evict or not self.description.place)

    @cached_property
    def lossless(self) -> tuple[Rung, ...]:
        """What costs no fidelity: pages of free cells, then blobs, then idle sequences. Of the latter two the
        least recently used first, whichever cache they are in."""
        able = self.description.capabilities
        free = list(self._free()) if able.release.able else []
        if not self.parks:
            return tuple(free)
        blobs = [
            Rung(Verb.PARK, cache, blob.n_bytes, blob=blob)
            for cache in self.snapshot.caches
            for blob in cache.blobs
            if able.blobs.able and not blob.parked and blob.n_bytes > 0
        ]
        idle = [rung for cache in self.snapshot.caches for rung in self._idle(cache)]
        by_use = [sorted(rungs, key=lambda rung: rung.used_s) for rungs in (blobs, idle)]
        return (*free, *by_use[0], *by_use[1])

    @cached_property
    def lossy(self) -> tuple[Rung, ...]:
        """What costs fidelity: ranges of running sequences to be masked, or of any to be evicted. Idle ones
        first, then the least recently used."""
        rungs = [rung for cache in self.snapshot.caches for rung in self._lossy(cache)]
        return tuple(sorted(rungs, key=lambda rung: (_runs(rung), rung.used_s)))

    @cached_property
    def preempting(self) -> tuple[Rung, ...]:
        """Running sequences that can be made to stand still, whole: only where memory is about to be gone. No
        fidelity is lost, but somebody waits."""
        if not self.parks or not self.description.capabilities.mask.able:
            return ()
        found = [
            (one.preempt_order, Rung(Verb.MASK, cache, one.live_cells * cache.cell_bytes, sequence=one))
            for cache in self.snapshot.caches
            for one in cache.sequences
            if one.running and one.preempt_order is not None and one.live_cells
        ]
        return tuple(rung for _, rung in sorted(found, key=lambda pair: pair[0]))

    def holdings(self) -> CacheSnapshot:
        """The caches as the law sees them."""
        live, masked, lost, last_used_s = 0, 0, 0, 0.0
        steps = []
        evicts = self.evicts
        for cache in self.snapshot.caches:
            size = cache.cell_bytes
            for blob in cache.blobs:
                live += blob.n_bytes
            for one in cache.sequences:
                live += one.live_cells * size
                masked += one.masked_cells * size
                lost += one.lost_cells * size
                last_used_s = max(last_used_s, one.last_used_s)
            if cache.sequences and (cache.maskable or evicts):
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

    # -- the rungs --------------------------------------------------------------------------------------

    def _free(self) -> Iterator[Rung]:
        for cache in self.snapshot.caches:
            if cache.free_resident_bytes > 0:
                yield Rung(Verb.RELEASE, cache, cache.free_resident_bytes)

    def _idle(self, cache: CacheState) -> Iterator[Rung]:
        """Sequences that are not being decoded, with what is resident of them."""
        for one in cache.sequences:
            n_bytes = one.live_cells * cache.cell_bytes - one.parked_bytes
            if not one.running and n_bytes > 0:
                yield Rung(Verb.PARK, cache, n_bytes, sequence=one)

    def _lossy(self, cache: CacheState) -> Iterator[Rung]:
        """Sequences that can give ranges. All of their cells count, resident or not: the next token reads
        what attention looks at."""
        masks = self.parks and self.description.capabilities.mask.able and cache.maskable
        evicts = self.evicts and cache.evictable
        for one in cache.sequences:
            cells = self.may_go(one) if evicts or (masks and one.running) else 0
            # Less than a block would make each token that is decoded at the floor a trim of its own.
            if cells >= self.config.block_cells:
                verb = Verb.EVICT if evicts else Verb.MASK
                yield Rung(verb, cache, cells * cache.cell_bytes, sequence=one)

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
        free = cells_in(self.protection(sequence).free(sequence.live, sequence.next_position))
        return max(0, min(free, sequence.live_cells - self.floor(sequence)))

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


def _bytes_of(rungs: Sequence[Rung]) -> int:
    return sum(rung.n_bytes for rung in rungs)


def _runs(rung: Rung) -> bool:
    return rung.sequence is not None and rung.sequence.running
