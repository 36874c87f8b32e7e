"""How a cache stands, in the words of the contract."""

from __future__ import annotations

import os
import time

from psi_kv_governor.cache import CacheState, SequenceState
from psi_kv_governor.engines.transformers.cache import GovernedCache
from psi_kv_governor.residence.mapping import NO_PLACE

_RUNNING_S = 1.0  # a sequence counts as running so long after its last token


def state_of(cache: GovernedCache) -> CacheState:
    """`cache` now. Waits for nothing."""
    tensors, places = cache.tensors, cache.places
    resident = sum(rows.mapping.resident_bytes(rows.parts()) for rows in tensors)
    free = sum(rows.mapping.resident_bytes(rows.parts(places.live_cells)) for rows in tensors)
    dirty = [rows.mapping.dirty_bytes(rows.parts()) for rows in tensors]
    used = sum(stop - start for rows in tensors for start, stop in rows.parts())
    sequence = SequenceState(
        id=0,
        next_position=places.next_position,
        live=places.live,
        masked=places.masked,
        lost=places.lost,
        affected=cache.affected,
        parked_bytes=max(0, used - resident),
        dirty_bytes=sum(number or 0 for number in dirty),
        running=cache.running or time.monotonic() - cache.last_used_s < _RUNNING_S,
        last_used_s=cache.last_used_s,
    )
    return CacheState(
        id=cache.id,
        name=cache.name,
        pid=os.getpid(),
        capacity_cells=cache.capacity_cells,
        cell_bytes=cache.cell_bytes,
        row_bytes=min((rows.piece_bytes for rows in tensors), default=0),
        resident_bytes=resident,
        free_resident_bytes=free,
        maskable=cache.place is not None,
        why_not_maskable="" if cache.place is not None else NO_PLACE,
        sequences=(sequence,) if tensors else (),
    )
