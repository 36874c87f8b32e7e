"""How a cache stands, in the words of the contract."""

from __future__ import annotations

import os
import time

from psi_kv_governor.cache import CacheState, SequenceState
from psi_kv_governor.engines.transformers.cache import GovernedCache
from psi_kv_governor.residence import Part
from psi_kv_governor.residence.mapping import NO_PLACE

_RUNNING_S = 1.0  # a sequence counts as running so long after its last token


def state_of(cache: GovernedCache) -> CacheState:
    """`cache` now. Waits for nothing."""
    tensors, places = cache.tensors, cache.places
    live_cells = places.live_cells
    live: list[tuple[Part, Part]] = [
        ((0, live_cells * rows.row_bytes), (live_cells * rows.row_bytes, rows.part[1])) for rows in tensors
    ]
    resident = sum(rows.mapping.resident_bytes([rows.part]) for rows in tensors)
    free = sum(rows.mapping.resident_bytes([part[1]]) for rows, part in zip(tensors, live, strict=True))
    dirty = [rows.mapping.dirty_bytes([rows.part]) for rows in tensors]
    used = sum(rows.part[1] for rows in tensors)
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
        row_bytes=min((rows.row_bytes for rows in tensors), default=0),
        resident_bytes=resident,
        free_resident_bytes=free,
        maskable=cache.place is not None,
        why_not_maskable="" if cache.place is not None else NO_PLACE,
        sequences=(sequence,) if tensors else (),
    )
