"""What the page is sent: a status in the few words that it draws."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from psi_kv_governor.amounts import mib
from psi_kv_governor.cache import CacheState, SequenceState
from psi_kv_governor.events import (
    AnsweredMasked,
    CacheClosed,
    CacheOpened,
    Degraded,
    Event,
    ModeChanged,
    Recomputed,
    Released,
    Restored,
    SourceChanged,
    Trimmed,
)
from psi_kv_governor.status import Status


class Strip(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence as a row of blocks."""

    sequence: int
    running: bool
    blocks: list[tuple[str, int]]
    """Kind (`live`, `parked`, `masked`, `lost` or `free`) and cells, in the order of positions. Of the live
    cells it is known how many are parked, not which: they are drawn first."""


class CacheView(msgspec.Struct, frozen=True, kw_only=True):
    """One cache."""

    id: int
    name: str
    capacity_cells: int
    cell_bytes: int
    resident_bytes: int
    saved_bytes: int
    """Of saved states (blobs), parked or not."""
    strips: list[Strip]


class View(msgspec.Struct, frozen=True, kw_only=True):
    """One moment."""

    time_s: float
    name: str
    mode: str
    reason: str
    some: float
    full: float
    headroom_bytes: int | None
    resident_bytes: int
    parked_bytes: int
    masked_cells: int
    lost_cells: int
    limit: float | None
    caches: list[CacheView]
    events: list[tuple[float, str, str]]
    """Monotonic time, kind and what happened, since the moment before."""


def view_of(time_s: float, status: Status, events: list[Event]) -> View:
    # The least of all levels: which of them is worst off by its share may change from one look to the next.
    known = [level.headroom_bytes for level in status.levels if level.headroom_bytes is not None]
    return View(
        time_s=time_s,
        name=status.name,
        mode=status.mode.value,
        reason=status.reason,
        some=status.some,
        full=status.full,
        headroom_bytes=min(known) if known else status.headroom_bytes,
        resident_bytes=status.resident_bytes,
        parked_bytes=status.parked_bytes,
        masked_cells=status.masked_cells,
        lost_cells=status.lost_cells,
        limit=status.limit,
        caches=[_cache(cache) for cache in status.caches],
        events=[(event.time_s, *_said(event)) for event in events],
    )


def _cache(cache: CacheState) -> CacheView:
    return CacheView(
        id=cache.id,
        name=cache.name,
        capacity_cells=cache.capacity_cells,
        cell_bytes=cache.cell_bytes,
        resident_bytes=cache.resident_bytes,
        saved_bytes=sum(blob.n_bytes for blob in cache.blobs),
        strips=[
            Strip(sequence=one.id, running=one.running, blocks=blocks_of(one, cache))
            for one in cache.sequences
        ],
    )


def blocks_of(sequence: SequenceState, cache: CacheState) -> list[tuple[str, int]]:
    """The blocks of one sequence, as `Strip` has them. They fill the cache, or what the sequence has if that
    is more (positions that were never decoded count as free)."""
    parked = sequence.parked_cells(cache.cell_bytes)
    blocks: list[tuple[str, int]] = []
    at = 0
    for kind, start, stop in sorted(_ranges(sequence), key=lambda one: one[1]):
        if start > at:
            blocks.append(("free", start - at))
        at = stop
        away = min(parked, stop - start) if kind == "live" else 0
        parked -= away
        blocks += [(what, cells) for what, cells in (("parked", away), (kind, stop - start - away)) if cells]
    if cache.capacity_cells > at:
        blocks.append(("free", cache.capacity_cells - at))
    return blocks


def _ranges(sequence: SequenceState) -> Iterator[tuple[str, int, int]]:
    for kind, ranges in (("live", sequence.live), ("masked", sequence.masked), ("lost", sequence.lost)):
        yield from ((kind, part.start, part.stop) for part in ranges)


def _said(event: Event) -> tuple[str, str]:
    """Kind and sentence of an event."""
    return _KINDS[type(event)], _sentence(event)


_KINDS: dict[type[Event], str] = {
    ModeChanged: "mode",
    Trimmed: "trimmed",
    Restored: "restored",
    Recomputed: "recomputed",
    Released: "released",
    Degraded: "degraded",
    SourceChanged: "source",
    CacheOpened: "opened",
    CacheClosed: "closed",
    AnsweredMasked: "masked",
}


def _sentence(event: Event) -> str:  # noqa: PLR0911  # a table with a line a kind
    match event:
        case ModeChanged():
            return f"{event.old.value} to {event.new.value}: {event.reason}"
        case Trimmed():
            kept = f", {event.masked:,} cells masked" if event.masked else ""
            return f"{mib(event.bytes_returned, 0)} returned{kept}: {event.reason}"
        case Restored():
            return f"{event.cells:,} cells and {mib(event.bytes_back, 0)} are back"
        case Recomputed():
            return f"{event.cells:,} tokens were decoded again"
        case Released():
            return f"{mib(event.bytes_returned, 0)} of cells nobody used went back"
        case Degraded():
            return f"{event.what}: {event.why}"
        case SourceChanged():
            return f"{event.source}: {event.why}"
        case CacheOpened():
            return f"{event.name} in process {event.pid}"
        case CacheClosed():
            return event.name
        case AnsweredMasked():
            return f"{event.tokens:,} tokens were decoded with up to {event.masked:,} cells masked"
