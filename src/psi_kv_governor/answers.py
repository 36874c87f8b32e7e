"""Which answers were given with cells masked: known from the cache itself, once each of them is whole."""

from __future__ import annotations

from collections.abc import Iterator

from psi_kv_governor.cache import CacheState, SequenceState, Snapshot
from psi_kv_governor.events import AnsweredMasked


class Answers:
    """Looks at each snapshot for tokens that were decoded while cells were masked or lost."""

    def __init__(self) -> None:
        self._told: dict[tuple[int, int], int] = {}
        """Tokens that were told of, by cache and sequence."""
        self._masked: dict[tuple[int, int], int] = {}
        """Most cells that were masked or lost while the answer was being given."""

    def ended(self, snapshot: Snapshot) -> Iterator[AnsweredMasked]:
        """Those that have ended since the snapshot before."""
        there = set()
        for cache in snapshot.caches:
            for sequence in cache.sequences:
                there.add((cache.id, sequence.id))
                yield from self._look(snapshot.time_s, cache, sequence)
        for gone in self._told.keys() - there:
            del self._told[gone]

    def _look(self, now_s: float, cache: CacheState, sequence: SequenceState) -> Iterator[AnsweredMasked]:
        key = cache.id, sequence.id
        before = min(self._told.get(key, 0), sequence.affected)  # fewer: others stand in their cells now
        hidden = sequence.masked_cells + sequence.lost_cells
        self._masked[key] = max(self._masked.get(key, 0), hidden)
        if sequence.running:
            self._told[key] = before
            return
        cells = self._masked.pop(key)
        self._told[key] = sequence.affected
        if sequence.affected > before:
            yield AnsweredMasked(
                time_s=now_s,
                cache=cache.id,
                pid=cache.pid,
                sequence=sequence.id,
                tokens=sequence.affected - before,
                masked=cells,
            )
