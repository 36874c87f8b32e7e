"""Snapshots for tests of the planner, and an engine that only describes them."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import strategies as st

from psi_kv_governor.cache import (
    BlobState,
    CacheState,
    Capabilities,
    Capability,
    Description,
    Evidence,
    Plan,
    Range,
    SequenceState,
    Snapshot,
    Step,
    Verb,
    cells_in,
)
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.simulated import CAPABLE
from psi_kv_governor.engines.simulated.evidence import PaperEvidence
from psi_kv_governor.engines.simulated.sequence import PaperSequence
from psi_kv_governor.errors import EngineError
from psi_kv_governor.policy import Policy, get_policy
from psi_kv_governor.policy.planner import Planner

CONFIG = GovernorConfig(sink_cells=16, window_cells=32, block_cells=8, floor_cells=64, floor_share=0.2)
CELLS = 1024
ABLE = Capability(able=True)
PLACELESS = Capability(able=False, why="there is no place to park")
CAN_EVICT = Capabilities(release=ABLE, park=PLACELESS, mask=PLACELESS, blobs=PLACELESS, evict=ABLE)


class Described:
    """What a planner asks of an engine: what it is, and evidence of sequences that are not in `gone`."""

    def __init__(self, capabilities: Capabilities = CAPABLE, place: str = "/there") -> None:
        self.description = Description(engine="described", capabilities=capabilities, place=place)
        self.gone: set[tuple[int, int]] = set()

    def describe(self) -> Description:
        return self.description

    def evidence(self, cache: int, sequence: int) -> Evidence:
        if (cache, sequence) in self.gone:
            raise EngineError(f"there is no sequence {sequence} in a cache {cache}")
        paper = PaperSequence(sequence, CELLS)
        paper.decode(CELLS, 0.0)
        return PaperEvidence(paper, CELLS, sequence)


def planner_of(
    policy: str | Policy = "window", config: GovernorConfig = CONFIG, engine: Described | None = None, **more
) -> Planner:
    policy = get_policy(policy) if isinstance(policy, str) else policy
    return Planner(policy, engine or Described(), config, **more)  # type: ignore[arg-type]


def sequence(number: int = 0, cells: int = 1000, **changes) -> SequenceState:
    """Whole, and being decoded unless it is said otherwise."""
    whole = {"live": (Range(0, cells),), "running": True, "last_used_s": 1.0}
    return SequenceState(id=number, next_position=cells, **{**whole, **changes})


def cache(*sequences: SequenceState, number: int = 1, cell_bytes: int = 100, **changes) -> CacheState:
    given = {"name": "a cache", "pid": 1, "capacity_cells": CELLS, "row_bytes": 4096, "maskable": True}
    return CacheState(
        id=number,
        cell_bytes=cell_bytes,
        sequences=sequences,
        **{"resident_bytes": sum(one.live_cells for one in sequences) * cell_bytes, **given, **changes},
    )


def snapshot(*caches: CacheState) -> Snapshot:
    return Snapshot(time_s=10.0, caches=caches)


def bytes_of(step: Step, now: Snapshot) -> int:
    """What a step gives up, or brings back."""
    held = next(one for one in now.caches if one.id == step.cache)
    if step.blob is not None:
        return next(blob.n_bytes for blob in held.blobs if blob.id == step.blob)
    if step.sequence is None:
        return held.free_resident_bytes
    if step.ranges:
        return cells_in(step.ranges) * held.cell_bytes
    one = next(one for one in held.sequences if one.id == step.sequence)
    return one.live_cells * held.cell_bytes - one.parked_bytes


def of_verb(plan: Plan, *verbs: Verb) -> list[Step]:
    return [step for step in plan.steps if step.verb in verbs]


def positions(ranges: Iterable[Range]) -> set[int]:
    return {position for part in ranges for position in range(*part)}


# -- any snapshot ------------------------------------------------------------------------------------------


@st.composite
def sequences(draw: st.DrawFn, number: int) -> SequenceState:
    """Live, masked, lost and never decoded ranges in any order."""
    edges = sorted(draw(st.sets(st.integers(0, CELLS), min_size=2, max_size=10)))
    parts: dict[str, list[Range]] = {"live": [], "masked": [], "lost": []}
    kinds = draw(st.lists(st.sampled_from(["live", "live", "masked", "lost", ""]), min_size=9, max_size=9))
    for start, stop, kind in zip(edges, edges[1:], kinds, strict=False):
        runs = parts.get(kind)
        if runs is not None and runs and runs[-1].stop == start:
            runs[-1] = Range(runs[-1].start, stop)
        elif runs is not None:
            runs.append(Range(start, stop))
    live_cells = cells_in(parts["live"])
    return SequenceState(
        id=number,
        next_position=edges[-1],
        live=tuple(parts["live"]),
        masked=tuple(parts["masked"]),
        lost=tuple(parts["lost"]),
        parked_bytes=0,
        running=draw(st.booleans()),
        last_used_s=draw(st.integers(0, 20)) / 2,
        head_cells=draw(st.sampled_from([0, 0, 40, 900])),
    ) if live_cells else sequence(number, 10)  # fmt: skip


@st.composite
def caches(draw: st.DrawFn, number: int) -> CacheState:
    held = [draw(sequences(one)) for one in range(draw(st.integers(0, 3)))]
    blobs = [
        BlobState(
            id=100 * number + one,
            n_bytes=draw(st.integers(0, 50_000)),
            parked=draw(st.booleans()),
            last_used_s=draw(st.integers(0, 20)) / 2,
        )
        for one in range(draw(st.integers(0, 3)))
    ]
    return cache(
        *held,
        number=number,
        cell_bytes=draw(st.sampled_from([10, 100, 1000])),
        row_bytes=draw(st.sampled_from([64, 4096])),
        maskable=draw(st.booleans()),
        why_not_maskable="flash attention is off",
        free_resident_bytes=draw(st.sampled_from([0, 0, 7_000, 2 << 20])),
        blobs=tuple(blobs),
    )


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    return snapshot(*(draw(caches(number)) for number in range(1, draw(st.integers(1, 3)) + 1)))
