"""How a governor stands, as one answer."""

from __future__ import annotations

import msgspec

from psi_kv_governor.cache import CacheState, Description, Recalled, Snapshot
from psi_kv_governor.control.decision import Mode
from psi_kv_governor.pressure.reading import Level, Reading


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """How things stand. `some` and `full` are shares of time, of the level that is worst off."""

    mode: Mode
    reason: str
    """Why it is in this mode, in one clause with the figures."""
    source: str
    """What is read of the machine's pressure."""
    name: str = ""
    """What is governed: the program's name, where one is known."""
    some: float
    full: float
    headroom_bytes: int | None
    levels: tuple[Level, ...]
    live_cells: int
    """Cells that attention looks at, resident or not."""
    masked_cells: int
    """Parked cells that attention passes over."""
    lost_cells: int
    """Cells whose content was dropped."""
    affected_tokens: int
    """Tokens decoded while others were masked or lost, that still stand in a cache."""
    resident_bytes: int
    """Of all caches and saved states, counted by the kernel."""
    parked_bytes: int
    """Bytes that are in a file and not in memory, masked ones included."""
    dirty_bytes: int
    """Resident bytes that would have to be written before they can go; 0 where it is not known."""
    written_bytes: int
    """Written for parking since the engine began: the wear of the disk."""
    backing: str
    place: str
    limit: float | None = None
    """Share of its cells that a cache may hold under pressure."""
    limit_bytes: int | None = None
    """Bytes that all caches together may hold under pressure; None where the limit is a share, or none."""
    caches: tuple[CacheState, ...] = ()
    recall: Recalled | None = None
    """What came back because it was looked for; None where the engine can't do that."""

    @classmethod
    def of(
        cls,
        snapshot: Snapshot,
        description: Description,
        *,
        name: str,
        mode: Mode,
        reason: str,
        source: str,
        reading: Reading,
        limit: float | None,
        limit_bytes: int | None,
        recall: Recalled | None = None,
    ) -> Status:
        """The status of an engine at this moment."""
        sequences = [(cache, sequence) for cache in snapshot.caches for sequence in cache.sequences]
        blobs = [blob for cache in snapshot.caches for blob in cache.blobs]
        return cls(
            mode=mode,
            reason=reason,
            source=source,
            name=name,
            some=reading.some,
            full=reading.full,
            headroom_bytes=reading.headroom_bytes,
            levels=reading.levels,
            live_cells=sum(sequence.live_cells for _, sequence in sequences),
            masked_cells=sum(sequence.masked_cells for _, sequence in sequences),
            lost_cells=sum(sequence.lost_cells for _, sequence in sequences),
            affected_tokens=sum(sequence.affected for _, sequence in sequences),
            resident_bytes=sum(cache.resident_bytes for cache in snapshot.caches),
            parked_bytes=sum(s.parked_bytes + s.masked_cells * cache.cell_bytes for cache, s in sequences)
            + sum(blob.n_bytes for blob in blobs if blob.parked),
            dirty_bytes=sum(sequence.dirty_bytes for _, sequence in sequences),
            written_bytes=snapshot.written_bytes,
            backing=description.backing,
            place=description.place,
            limit=limit,
            limit_bytes=limit_bytes,
            caches=snapshot.caches,
            recall=recall,
        )
