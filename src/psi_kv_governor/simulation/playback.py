"""A recording played again: through the law as it was, or with other settings on a simulated cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import Action, CacheSnapshot, LawState, Turn, decide
from psi_kv_governor.engine.simulated import SimulatedEngine
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.pressure.reading import Reading
from psi_kv_governor.simulation.pilot import Pilot

LONGEST_GAP_S = 5.0
"""A longer pause between two turns (a suspended machine, a lost source) is in no mode's time."""

MOST_CELLS = 1 << 24
"""The simulated ledger takes a byte for each."""


class Difference(NamedTuple):
    """The first turn that the law decides otherwise today."""

    turn: int
    """Counted from 1: its line in the file is one more."""
    recorded: bytes
    """The decision as JSON."""
    replayed: bytes


def first_difference(config: GovernorConfig, turns: Sequence[Turn]) -> Difference | None:
    """Play `turns` through the law from its first state on, and compare each decision byte for byte."""
    encoder = msgspec.json.Encoder()
    state = LawState()
    for number, turn in enumerate(turns, start=1):
        decision, state = decide(config, state, turn.reading, turn.cache, turn.cache_limit)
        recorded, replayed = encoder.encode(turn.decision), encoder.encode(decision)
        if recorded != replayed:
            return Difference(number, recorded, replayed)
    return None


def play(config: GovernorConfig, turns: Sequence[Turn]) -> list[Turn]:
    """What `config` would have done: the recorded readings, with the decisions played on a simulated cache.

    It begins as the first snapshot was, and its context grows and shrinks as the recorded one did; what is
    given up and comes back is its own. The readings stay as they were: they still show what the recorded
    decisions returned to the machine, and come when they came (poll_s and poll_busy_s change nothing).
    Raises BadInputError when the policy is unknown, or the context is longer than any.
    """
    first = turns[0].cache
    cells = max(turn.cache.total_cells for turn in turns)
    if cells > MOST_CELLS:
        raise BadInputError(f"a context of {cells} cells can't be played: {MOST_CELLS} are the most")
    engine = SimulatedEngine(
        max(1, cells),
        cell_bytes=next((turn.cache.cell_bytes for turn in turns if turn.cache.cell_bytes), 1),
        blob_cells=config.block_cells,
    )
    pilot = Pilot(config, engine)
    pilot.resize(first.total_cells)
    pilot.give_up(first.spilled_cells, first.lost_cells)
    played = []
    for turn in turns:
        pilot.resize(turn.cache.total_cells)
        pilot.step(turn.reading, turn.cache_limit)
        assert pilot.turn is not None, "a step was made"
        played.append(pilot.turn)
    return played


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """What a run of turns comes to. Cells are those that the law asked for."""

    seconds: float
    mode_s: dict[str, float]
    """Time in each mode that was entered."""
    trims: int
    cells_given_up: int
    restores: int
    cells_restored: int
    direction_changes: int
    """How often a trim followed a restore, or the other way round."""
    min_live_share: float
    """Least share of the context that was live."""
    missing_cells: int
    """Cells spilled or lost at the last turn."""
    first_trim_s: float | None
    """When the first trim was, from the first turn on; None without one."""
    onset_s: float | None
    """When memory first was short by the thresholds that were asked for; None if it never was."""
    onset_to_trim_s: float | None
    """From there to the first trim at or after it."""
    trims_before_onset: int
    """Trims although memory was not short yet."""


def account(turns: Sequence[Turn], thresholds: GovernorConfig) -> Account:
    """Sum up `turns`. The onset is told by `thresholds`: give all runs that are compared the same ones."""
    start_s = turns[0].reading.time_s
    deeds = [turn for turn in turns if turn.decision.action is not Action.NONE]
    trims = [turn for turn in deeds if turn.decision.action is Action.TRIM]
    restores = [turn for turn in deeds if turn.decision.action is Action.RESTORE]
    onset_s = next((turn.reading.time_s for turn in turns if short(thresholds, turn.reading)), None)
    after = [turn.reading.time_s for turn in trims if onset_s is not None and turn.reading.time_s >= onset_s]
    return Account(
        seconds=_seconds(turns[-1].reading.time_s - start_s),
        mode_s=_mode_s(turns),
        trims=len(trims),
        cells_given_up=sum(turn.decision.cells for turn in trims),
        restores=len(restores),
        cells_restored=sum(turn.decision.cells for turn in restores),
        direction_changes=sum(a.decision.action is not b.decision.action for a, b in pairwise(deeds)),
        min_live_share=round(min(_live_share(turn.cache) for turn in turns), 4),
        missing_cells=turns[-1].cache.spilled_cells + turns[-1].cache.lost_cells,
        first_trim_s=_seconds(trims[0].reading.time_s - start_s) if trims else None,
        onset_s=None if onset_s is None else _seconds(onset_s - start_s),
        onset_to_trim_s=_seconds(after[0] - onset_s) if after and onset_s is not None else None,
        trims_before_onset=len(trims) - len(after),
    )


def short(config: GovernorConfig, reading: Reading) -> bool:
    """Whether memory is short in one reading alone: stall over `high` without plenty, or no headroom."""
    stalled = reading.interval_s > 0.0 and reading.some >= config.high
    if reading.headroom_bytes is None or not reading.limit_bytes:
        return stalled
    share = reading.headroom_bytes / reading.limit_bytes
    return share < config.headroom_low or (stalled and share <= config.headroom_plenty)


def _mode_s(turns: Sequence[Turn]) -> dict[str, float]:
    """Time from each turn to the next, added up by the mode that the turn led to."""
    spent: dict[str, float] = {}
    for turn, after in pairwise(turns):
        gap_s = after.reading.time_s - turn.reading.time_s
        mode = turn.decision.mode.value
        spent[mode] = spent.get(mode, 0.0) + (gap_s if gap_s <= LONGEST_GAP_S else 0.0)
    return {mode: _seconds(seconds) for mode, seconds in spent.items()}


def _live_share(cache: CacheSnapshot) -> float:
    return cache.live_cells / cache.total_cells if cache.total_cells else 1.0


def _seconds(seconds: float) -> float:
    return round(seconds, 3)
