"""One turn of the loop, whole: what went into the law and what came out."""

from __future__ import annotations

import msgspec

from psi_kv_governor.control.decision import CacheSnapshot, Decision
from psi_kv_governor.pressure.reading import Reading


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """What `decide` was given, and its answer. The turns of a run from its first, played through the law
    from `LawState(jitter=jitter)` on, give the same decisions again."""

    reading: Reading
    cache: CacheSnapshot
    cache_limit: float | None
    """What `psi_set_cache_limit` had set, a share of the context."""
    decision: Decision
    jitter: float = 0.0
    """What the law's state began with."""
