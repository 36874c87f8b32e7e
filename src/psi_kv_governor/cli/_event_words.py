"""An event of the governor in words, wherever a command shows one."""

from __future__ import annotations

from psi_kv_governor.amounts import mib
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


def words_of(event: Event) -> str:
    """An event of the governor in a line."""
    match event:
        case AnsweredMasked():
            words = (
                f"sequence {event.sequence} of process {event.pid}: {event.tokens:,} tokens were decoded "
                f"with up to {event.masked:,} cells masked"
            )
        case CacheOpened():
            words = f"governs cache {event.cache} ({event.name}) of process {event.pid}"
        case CacheClosed():
            words = f"cache {event.cache} ({event.name}) is closed"
        case Trimmed():
            kind = f"{event.cells:,} cells, {event.masked:,} of them masked"
            if event.lost:
                kind = f"{event.lost:,} cells for good, there being no place to park"
            elif not event.cells:
                kind = "saved states"
            words = f"gave up {kind}: {mib(event.bytes_returned)} returned"
        case Restored():
            words = (
                f"brought {event.cells:,} cells back in {event.seconds * 1e3:.0f} ms, "
                f"{mib(event.masked_bytes)} still masked"
            )
        case Recomputed():
            words = f"decoded {event.cells:,} tokens again in {event.seconds:.1f} s"
        case Released():
            words = f"released {mib(event.bytes_returned)} of free cells"
        case Degraded():
            words = f"does without {event.what}: {event.why}"
        case ModeChanged():
            words = f"{event.new.value}: {event.reason}"
        case SourceChanged():
            words = f"reads {event.source} ({event.why})"
    return words
