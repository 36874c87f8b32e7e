"""What an agent tells of a cache, in the words that all engines share."""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from psi_kv_governor.cache import BlobState, CacheState, Range, Result, SequenceState, Verb
from psi_kv_governor.engines.llama.client import (
    NO_SUCH,
    BlobInfo,
    BufferInfo,
    Client,
    RegionInfo,
    Reply,
    SequenceInfo,
)

MASKED, PARKED, AFFECTED, LOST = 2, 4, 8, 16  # enum row_flag in agent.h
SAVED_STATES = 1 << 19
"""`CacheState.id` of a process' saved states: above those of its buffers."""
_RUNNING_S = 1.0
"""A sequence that was decoded within so long is running: between two tokens of a slow machine."""


def cache_state(
    client: Client,
    region: RegionInfo,
    *,
    pid: int,
    now_s: float,
    most_rows: int,
    resident_bytes: int,
    frees_swap: bool,
    head_cells: int,
) -> CacheState:
    """One cache as it is told to a planner; `most_rows` are those of the largest of its context."""
    if not region.by_cell:
        sequences: tuple[SequenceState, ...] = (
            SequenceState(
                id=-1,
                next_position=1,
                live=(Range(0, 1),),
                running=region.computing or now_s - region.used_s < _RUNNING_S,
                last_used_s=region.used_s,
            ),
        )
    else:
        sequences = tuple(_sequence(client, region, one, now_s, head_cells) for one in region.sequences)
    # Of a model with sliding windows the small cache slides by itself.
    slides = region.by_cell and region.rows < most_rows
    why = "its window slides by itself" if slides else region.why_not_maskable
    return CacheState(
        id=region.id,
        name="keys and values" if region.by_cell else "recurrent state",
        pid=pid,
        capacity_cells=region.rows or 1,
        cell_bytes=region.cell_bytes if region.by_cell else region.size,
        row_bytes=region.row_bytes if region.by_cell else region.size,
        resident_bytes=resident_bytes,
        maskable=region.maskable and not slides,
        evictable=region.by_cell and not slides,
        why_not_maskable=why if region.by_cell else "a recurrent state has no cells",
        free_resident_bytes=_free_resident(region, resident_bytes),
        frees_swap=frees_swap,
        sequences=sequences,
    )


def _free_resident(region: RegionInfo, resident_bytes: int) -> int:
    """Counted bytes beyond what the used cells take.

    Parked cells hide some: a lower bound. The page in which used rows of a tensor end can't go.
    """
    if not region.by_cell:
        return 0
    used = sum(sequence.cells for sequence in region.sequences) * region.cell_bytes
    edges = region.cell_bytes // max(1, region.row_bytes) * mmap.PAGESIZE
    return max(0, resident_bytes - used - edges)


def _sequence(
    client: Client, region: RegionInfo, info: SequenceInfo, now_s: float, head_cells: int
) -> SequenceState:
    live: tuple[Range, ...] = (Range(info.low, info.high + 1),)
    masked: tuple[Range, ...] = ()
    lost: tuple[Range, ...] = ()
    parked = info.parked
    if info.masked or info.lost or info.cells != info.high + 1 - info.low:
        cells = client.cells(region.id, info.id)
        live = _runs(cells[(cells[:, 1] & (MASKED | LOST)) == 0, 0])
        masked = _runs(cells[(cells[:, 1] & MASKED) != 0, 0])
        lost = _runs(cells[(cells[:, 1] & LOST) != 0, 0])
        parked = int(np.count_nonzero((cells[:, 1] & (MASKED | PARKED)) == PARKED))
    return SequenceState(
        id=info.id,
        next_position=info.high + 1,
        live=live,
        masked=masked,
        lost=lost,
        affected=info.affected,
        parked_bytes=parked * region.cell_bytes,
        running=now_s - info.used_s < _RUNNING_S or (region.computing and info.used_s == region.used_s),
        last_used_s=info.used_s,
        head_cells=head_cells,
    )


def _runs(positions: npt.NDArray[np.int32]) -> tuple[Range, ...]:
    """Sorted positions as ranges."""
    if not len(positions):
        return ()
    positions = np.unique(positions)
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    parts = np.split(positions, breaks)
    return tuple(Range(int(part[0]), int(part[-1]) + 1) for part in parts)


def saved_states(pid: int, blobs: Iterable[BlobInfo], kept: tuple[BlobState, ...]) -> tuple[CacheState, ...]:
    """The saved states of a process, as a cache without cells; `kept` are those of its Python side."""
    states = kept + tuple(
        BlobState(
            id=blob.id,
            n_bytes=blob.n_bytes,
            parked=blob.parked,
            last_used_s=blob.used_s,
            kind="checkpoint" if blob.checkpoint else "prompt",
        )
        for blob in blobs
    )
    if not states:
        return ()
    return (
        CacheState(
            id=SAVED_STATES,
            name="saved states",
            pid=pid,
            capacity_cells=0,
            cell_bytes=1,
            row_bytes=1,
            resident_bytes=sum(blob.n_bytes for blob in states if not blob.parked),
            maskable=False,
            why_not_maskable="nothing attends to a saved state",
            blobs=states,
        ),
    )


def why_none(away: list[str]) -> str:
    """Why there is no cache that gives pages back."""
    if not away:
        return "no cache is open, or it is too small to matter (1 MiB)"
    return (
        f"its keys and values are in {' and '.join(away)}, where no page can be returned: of a program saved "
        "states are parked, GovernedLlama makes its context smaller, and with offload_kqv=False "
        "(--no-kv-offload) they are in host memory"
    )


def elsewhere(buffers: Iterable[BufferInfo]) -> list[str]:
    """The memory that holds these, with its size, as far as it is not plain memory of the host."""
    sizes: dict[str, int] = {}
    for one in buffers:
        if one.name != "CPU":
            sizes[one.name] = sizes.get(one.name, 0) + one.n_bytes
    return [f"{name} ({n_bytes / 2**20:,.0f} MiB)" for name, n_bytes in sizes.items()]


def result_of(reply: Reply, verb: Verb) -> Result:
    """What was done, of the answer to an order."""
    back = verb in {Verb.UNMASK, Verb.UNPARK}
    gone = "the sequence is gone" if reply.status == NO_SUCH else ""
    return Result(
        bytes_returned=0 if back else reply.n_bytes,
        bytes_back=reply.n_bytes if back else 0,
        cells=reply.cells,
        masked=reply.masked,
        lost=reply.cells if verb is Verb.EVICT else 0,
        written_bytes=reply.written,
        done=reply.done,
        problem=reply.problem or gone,
    )
