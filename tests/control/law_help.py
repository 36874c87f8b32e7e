"""Readings of one level and snapshots in round figures, for tests of the law."""

from __future__ import annotations

import msgspec

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import Action, CacheSnapshot, Decision, LawState, decide
from psi_kv_governor.pressure.reading import Reading, one_level

LIMIT_BYTES = 1_000_000_000
CELL_BYTES = 1_000
CONFIG = GovernorConfig()


def reading(
    time_s: float = 100.0,
    some: float = 0.0,
    headroom: float | None = None,
    interval_s: float = 1.0,
    *,
    full: float | None = None,
    own: float = 0.0,
):
    """`headroom` is a share of the limit; None leaves headroom and limit unknown."""
    return one_level(
        time_s=time_s,
        interval_s=interval_s,
        some=some,
        full=some / 4 if full is None else full,
        headroom_bytes=None if headroom is None else round(headroom * LIMIT_BYTES),
        limit_bytes=None if headroom is None else LIMIT_BYTES,
        own=own,
    )


def changed(look: Reading, **change) -> Reading:
    """`look` with other figures, of the reading or of its one level."""
    of_reading = {name: value for name, value in change.items() if name in Reading.__struct_fields__}
    level = msgspec.structs.replace(
        look.levels[0], **{name: value for name, value in change.items() if name not in of_reading}
    )
    return msgspec.structs.replace(look, levels=(level,), **of_reading)


def snapshot(
    live: int = 4096,
    spilled: int = 0,
    lost: int = 0,
    trimmable: int | None = None,
    *,
    lossless: int = 0,
    block: int = 64,
):
    """In cells of 1,000 bytes. The planner keeps 320 protected cells, and a fifth of the context."""
    kept = max(320, -(-(live + spilled + lost) // 5))
    return CacheSnapshot(
        live_bytes=live * CELL_BYTES,
        masked_bytes=spilled * CELL_BYTES,
        lost_bytes=lost * CELL_BYTES,
        trimmable_bytes=(max(0, live - kept) if trimmable is None else trimmable) * CELL_BYTES,
        lossless_bytes=lossless * CELL_BYTES,
        step_bytes=block * CELL_BYTES,
    )


def cells(decision: Decision) -> int:
    return decision.n_bytes // CELL_BYTES


def first(look: Reading, cache: CacheSnapshot, config: GovernorConfig = CONFIG, **more) -> Decision:
    return decide(config, LawState(), look, cache, **more)[0]


def follow(looks: list[Reading], cache: CacheSnapshot, config: GovernorConfig = CONFIG) -> list[Decision]:
    """As `replay`, with a cache that does what it is told."""
    state, decisions = LawState(), []
    for look in looks:
        decision, state = decide(config, state, look, cache)
        decisions.append(decision)
        gone = cells(decision) if decision.action is Action.TRIM else -cells(decision)
        live, spilled = cache.live_bytes // CELL_BYTES - gone, cache.masked_bytes // CELL_BYTES + gone
        cache = snapshot(live=live, spilled=spilled)
    return decisions


def replay(looks: list[Reading], cache: CacheSnapshot, config: GovernorConfig = CONFIG) -> list[Decision]:
    state, decisions = LawState(), []
    for look in looks:
        decision, state = decide(config, state, look, cache)
        decisions.append(decision)
    return decisions


def pressed(n: int, begin_s: float = 100.0, some: float = 0.5, headroom: float = 0.03) -> list[Reading]:
    """Two readings a second."""
    return [reading(time_s=begin_s + i / 2, some=some, headroom=headroom, interval_s=0.5) for i in range(n)]
