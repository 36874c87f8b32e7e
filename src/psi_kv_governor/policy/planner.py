"""From an amount of bytes to a plan: the ladder over all caches, and the policy on its last rung."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from psi_kv_governor.cache import Engine, Plan, Range, Snapshot, Step, Verb, merged, without
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import SLICE_BYTES, CacheSnapshot
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.policy.base import Policy
from psi_kv_governor.policy.ladder import LEAST_RELEASE_BYTES, Ladder, Rung
from psi_kv_governor.policy.scoring import Scores

SLICE_S = 0.05
"""Longest that one slice of a restore takes before the machine is looked at again."""

TRIM_S = 0.5
"""Longest that an urgent trim takes before the machine is looked at again: 83 MB are written in 0.1 s where
the disk does 0.75 GB/s, and 200 MB/s of somebody's taking leave the low line of an 8 GB machine for 1.6 s."""


class Planner:
    """Makes plans for one engine. A sequence that changes between a snapshot and its plan does no harm: the
    engine skips what is not there."""

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        config: GovernorConfig,
        complain: Callable[[str], None] = lambda why: None,
    ) -> None:
        self.policy = policy
        self.marks: dict[int | None, tuple[Range, ...]] = {}
        """What the caller protects, by sequence (None: in each): positions, whatever is decoded there."""
        self._engine = engine
        self._config = config
        self._scores = Scores(policy, engine.evidence, config.block_cells, complain)

    def ladder(self, snapshot: Snapshot) -> Ladder:
        """What can be given up of `snapshot`."""
        return Ladder(snapshot, self._engine.describe(), self._config, self.marks)

    def holdings(self, snapshot: Snapshot) -> CacheSnapshot:
        """The caches as the law sees them. To be asked of every snapshot: it forgets what is gone."""
        self._scores.forget(snapshot)
        return self.ladder(snapshot).holdings()

    def why_nothing(self, snapshot: Snapshot) -> str:
        """Why a trim gives nothing, in one clause; '' where it gives something."""
        return self.ladder(snapshot).why_nothing()

    def protect(self, positions: Range, sequence: int | None) -> None:
        """Never give up `positions` of `sequence` (None: of each) until `unprotect`. Raises BadInputError."""
        _check(positions)
        self.marks[sequence] = (*self.marks.get(sequence, ()), positions)

    def unprotect(self, positions: Range, sequence: int | None) -> None:
        """Take the caller's protection off `positions`; without a sequence off those of each. Raises
        BadInputError."""
        _check(positions)
        for one in [sequence] if sequence is not None else list(self.marks):
            left = tuple(rest for mark in self.marks.get(one, ()) for rest in without(mark, positions))
            self.marks[one] = left
            if not left:
                del self.marks[one]

    # -- giving up --------------------------------------------------------------------------------------

    def trim(self, snapshot: Snapshot, n_bytes: int, *, urgent: bool = False) -> Plan:
        """The plan that gives up `n_bytes`, rounded up to whole blocks: what costs least first."""
        ladder = self.ladder(snapshot)
        steps: list[Step] = []
        left = n_bytes
        for rung in ladder.lossless:
            if left <= 0:
                break
            steps.append(self._whole_or_first(rung, left))
            left -= rung.n_bytes
        if left > 0:
            steps += self._by_policy(ladder, left)
        if urgent:  # by the bytes that idle sequences and ranges don't make
            left -= sum(rung.n_bytes for rung in ladder.lossy)
            steps += _whole(ladder.preempting, left)
        block_bytes = max((self._block_bytes(rung) for rung in (*ladder.lossless, *ladder.lossy)), default=1)
        return Plan(
            steps=tuple(steps),
            deadline_s=TRIM_S if urgent else math.inf,
            max_bytes=-(-max(0, n_bytes) // block_bytes) * block_bytes,
            urgent=urgent,
        )

    def _block_bytes(self, rung: Rung) -> int:
        return max(1, self._config.block_cells * rung.cache.cell_bytes) if rung.sequence is not None else 1

    def _whole_or_first(self, rung: Rung, n_bytes: int) -> Step:
        """All of a rung; or the oldest blocks of an idle sequence, where fewer bytes are asked for."""
        if rung.sequence is None:
            return Step(verb=rung.verb, cache=rung.cache.id, blob=None if rung.blob is None else rung.blob.id)
        ranges: tuple[Range, ...] = ()
        if n_bytes < rung.n_bytes:
            block, cell_bytes = self._config.block_cells, rung.cache.cell_bytes
            # What was parked before are its oldest ones too: they cost nothing to name.
            parked = rung.sequence.parked_cells(cell_bytes)
            cells = parked + _in_blocks(n_bytes, cell_bytes, block)
            ranges = tuple(_first(rung.sequence.live, cells))
        return Step(verb=rung.verb, cache=rung.cache.id, sequence=rung.sequence.id, ranges=ranges)

    def _by_policy(self, ladder: Ladder, n_bytes: int) -> Iterator[Step]:
        """Ranges of sequences by the policy's scores, each giving its share; all together in whole blocks."""
        rungs = ladder.lossy
        of_all = sum(rung.n_bytes for rung in rungs)
        for rung in rungs:
            if n_bytes <= 0 or rung.sequence is None:
                return
            cell_bytes, block = rung.cache.cell_bytes, self._config.block_cells
            share = -(-n_bytes * rung.n_bytes // of_all)
            cells = min(_in_blocks(share, cell_bytes, block), rung.n_bytes // cell_bytes)
            of_all -= rung.n_bytes
            ranges = self._scores.lowest(rung.cache, rung.sequence, ladder.protection(rung.sequence), cells)
            if ranges:
                n_bytes -= cells * cell_bytes
                yield Step(
                    verb=rung.verb, cache=rung.cache.id, sequence=rung.sequence.id, ranges=tuple(ranges)
                )

    # -- back again -------------------------------------------------------------------------------------

    def restore(self, snapshot: Snapshot, n_bytes: int) -> Plan:
        """A slice of what is masked, what scored highest first."""
        wanted = [
            (self._scores.last(cache.id, one, part), cache, one.id, part)
            for cache in snapshot.caches
            for one in cache.sequences
            for part in _blocks(one.masked, self._config.block_cells)
        ]
        wanted.sort(key=lambda block: -block[0])
        whole = any(cache.rebuilt for cache in snapshot.caches)
        left = slice_bytes = max(0, n_bytes if whole else min(n_bytes, SLICE_BYTES))
        chosen: dict[tuple[int, int], list[Range]] = {}
        for _, cache, sequence, part in wanted:
            if left <= 0:
                break
            left -= part.cells * cache.cell_bytes
            chosen.setdefault((cache.id, sequence), []).append(part)
        steps = tuple(
            Step(verb=Verb.UNMASK, cache=cache, sequence=sequence, ranges=tuple(merged(ranges)))
            for (cache, sequence), ranges in chosen.items()
        )
        return Plan(steps=steps, deadline_s=SLICE_S, max_bytes=slice_bytes)

    # -- beforehand -------------------------------------------------------------------------------------

    def release(self, snapshot: Snapshot) -> Plan | None:
        """Return what free cells hold, in memory or in swap, where it is worth a look."""
        steps = tuple(
            Step(verb=Verb.RELEASE, cache=cache.id)
            for cache in snapshot.caches
            if (
                cache.free_resident_bytes - cache.free_soon_used_bytes >= LEAST_RELEASE_BYTES
                or cache.frees_swap
            )
            and not cache.rebuilt
        )
        return Plan(steps=steps) if steps and self._engine.describe().capabilities.release.able else None

    def park_blobs(self, snapshot: Snapshot, *, kept: bool = False) -> Plan | None:
        """Park saved states as soon as they are whole: they are read again only when they are loaded.

        Those that are `kept` are only written, and their clean pages are the kernel's to take: what is loaded
        soon on a calm machine is not read from the disk.
        """
        if not any(cache.blobs for cache in snapshot.caches):
            return None
        return _all(
            rung._replace(verb=Verb.WRITE_BEHIND) if kept else rung
            for rung in self.ladder(snapshot).lossless
            if rung.blob is not None
        )

    def write_behind(self, snapshot: Snapshot) -> Plan | None:
        """Write what is dirty and may go, while the machine is merely busy."""
        ladder = self.ladder(snapshot)
        if not ladder.parks:
            return None
        steps = [
            Step(verb=Verb.WRITE_BEHIND, cache=cache.id, sequence=one.id, ranges=ranges)
            for cache in snapshot.caches
            for one in cache.sequences
            if (ranges := tuple(ladder.protection(one).free(one.live, one.next_position)))
        ]
        return Plan(steps=tuple(steps), deadline_s=SLICE_S) if steps else None


def _whole(rungs: Sequence[Rung], n_bytes: int) -> Iterator[Step]:
    """Sequences that stand still, in order, until `n_bytes` are there."""
    for rung in rungs:
        if n_bytes <= 0 or rung.sequence is None:
            return
        n_bytes -= rung.n_bytes
        yield Step(verb=rung.verb, cache=rung.cache.id, sequence=rung.sequence.id)


def _check(positions: Range) -> None:
    if not 0 <= positions.start < positions.stop:
        raise BadInputError(
            f"positions {positions.start} to {positions.stop} are not usable: give 0 <= start < stop"
        )


def _all(rungs: Iterator[Rung]) -> Plan | None:
    steps = [
        Step(verb=rung.verb, cache=rung.cache.id, blob=None if rung.blob is None else rung.blob.id)
        for rung in rungs
    ]
    return Plan(steps=tuple(steps)) if steps else None


def _in_blocks(n_bytes: int, cell_bytes: int, block_cells: int) -> int:
    """Cells of the whole blocks that hold `n_bytes`."""
    return -(-n_bytes // cell_bytes // block_cells) * block_cells


def _first(live: Sequence[Range], cells: int) -> Iterator[Range]:
    for part in live:
        if cells <= 0:
            return
        yield Range(part.start, min(part.stop, part.start + cells))
        cells -= part.cells


def _blocks(ranges: Sequence[Range], block_cells: int) -> Iterator[Range]:
    """`ranges` cut at multiples of `block_cells`, where the policy cut them."""
    for part in ranges:
        start = part.start
        while start < part.stop:
            stop = min(part.stop, (start // block_cells + 1) * block_cells)
            yield Range(start, stop)
            start = stop
