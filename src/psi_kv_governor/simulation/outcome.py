"""What a run is summed up to: the figures of the table and of the JSON."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import msgspec

from psi_kv_governor.control.state import BUDGET_WINDOW_S


class Act(msgspec.Struct, frozen=True, kw_only=True):
    """One trim or restore."""

    time_s: float
    """When it began ..."""
    until_s: float
    """... and when its last slice came back; the same for a trim."""
    action: str
    """`trim` or `restore`."""
    cells: int
    bytes_returned: int
    live_cells: int
    """Live cells right after it."""
    total_cells: int
    reason: str


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Times count from its start; fields are None where the run could not tell."""

    scenario: str
    about: str
    seconds: float
    trims: int
    cells_given_up: int
    bytes_returned: int
    restores: int
    cells_restored: int
    missing_cells: int
    """Cells masked or lost at the end."""
    min_live_share: float
    """Least share of the context that was live."""
    most_given_up_per_min: float
    """Most cells given up in any 60 s, as a multiple of the context at that time; see budget_per_min."""
    direction_changes: int
    """How often a trim followed a restore, or the other way round."""
    shortest_swing_s: float | None
    """Least time between two changes of direction; None with fewer than two."""
    onset_s: float | None
    """When memory first was short by the thresholds; None if it never was."""
    first_action_after_s: float | None
    """From there to the first trim."""
    stall_s: float
    """Time lost to stalls, with the governor; of a replayed trace, as recorded."""
    stall_ungoverned_s: float | None = None
    """The same without it; None for a replayed trace, which was what it was."""
    tokens: int | None = None
    tokens_ungoverned: int | None = None
    written_bytes: int = 0
    """Written to the disk for it."""
    acts: tuple[Act, ...] = ()


class Cells(Protocol):
    """The steps of a run that are summed up."""

    time_s: list[float]
    live_cells: list[int]
    masked_cells: list[int]
    lost_cells: list[int]


def summed_up(name: str, about: str, acts: Sequence[Act], track: Cells, onset_s: float | None) -> Outcome:
    """The figures that follow from the acts and the cells; stall and tokens are left to the caller."""
    trims = [act for act in acts if act.action == "trim"]
    restores = [act for act in acts if act.action == "restore"]
    turns_s = [after.time_s for before, after in pairwise(acts) if before.action != after.action]
    totals = map(sum, zip(track.live_cells, track.masked_cells, track.lost_cells, strict=True))
    shares = [live / total for live, total in zip(track.live_cells, totals, strict=True) if total]
    return Outcome(
        scenario=name,
        about=about,
        seconds=round(track.time_s[-1], 3),
        trims=len(trims),
        cells_given_up=sum(act.cells for act in trims),
        bytes_returned=sum(act.bytes_returned for act in trims),
        restores=len(restores),
        cells_restored=sum(act.cells for act in restores),
        missing_cells=track.masked_cells[-1] + track.lost_cells[-1],
        min_live_share=round(min(shares, default=1.0), 4),
        most_given_up_per_min=round(_most_in_a_minute(trims), 4),
        direction_changes=len(turns_s),
        shortest_swing_s=min((round(b - a, 3) for a, b in pairwise(turns_s)), default=None),
        onset_s=None if onset_s is None else round(onset_s, 3),
        first_action_after_s=_after(onset_s, trims),
        stall_s=0.0,
        acts=tuple(acts),
    )


def _after(onset_s: float | None, trims: Sequence[Act]) -> float | None:
    if onset_s is None or not trims:
        return None
    return max(0.0, round(trims[0].time_s - onset_s, 3))  # times of acts are rounded: not below 0


def _most_in_a_minute(trims: Sequence[Act]) -> float:
    """Most cells in any window that ends with a trim, as a multiple of the context then."""
    most, inside, first = 0.0, 0, 0
    for last in trims:
        inside += last.cells
        while last.time_s - trims[first].time_s > BUDGET_WINDOW_S:
            inside -= trims[first].cells
            first += 1
        most = max(most, inside / last.total_cells)
    return most
