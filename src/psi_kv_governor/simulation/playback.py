"""A recording played again: through the law as it was, or with other settings on a simulated cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec

from psi_kv_governor.cache import Plan, Range, Step, Verb
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import Action, CacheSnapshot, LawState, Turn, decide
from psi_kv_governor.engines.simulated import SimulatedEngine
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.governor import Governor
from psi_kv_governor.pressure.trace import TraceSource
from psi_kv_governor.simulation.process import Clock
from psi_kv_governor.simulation.run import short

LONGEST_GAP_S = 5.0
"""A longer pause between two turns (a suspended machine, a lost source) is in no mode's time."""

MOST_CELLS = 1 << 24
"""The simulated cache takes four bytes for each."""


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
    state = LawState(jitter=turns[0].jitter)
    for number, turn in enumerate(turns, start=1):
        decision, state = decide(config, state, turn.reading, turn.cache, turn.cache_limit)
        recorded, replayed = encoder.encode(turn.decision), encoder.encode(decision)
        if recorded != replayed:
            return Difference(number, recorded, replayed)
    return None


def play(config: GovernorConfig, turns: Sequence[Turn], recorded: GovernorConfig) -> list[Turn]:
    """What `config` would have done: the recorded readings, with the decisions played on a simulated cache.

    It begins as the first snapshot was, and its context grows and shrinks as the recorded one did; what is
    given up and comes back is its own. The readings stay as they were: they still show what the decisions
    made with the settings `recorded` returned to the machine, and come when they came (poll_s and poll_busy_s
    change nothing). Raises BadInputError when the policy is unknown, or the context is longer than any.
    """
    cell_bytes = max(1, turns[0].cache.step_bytes // recorded.block_cells)
    capacity = max(turn.cache.total_bytes for turn in turns) // cell_bytes
    if capacity > MOST_CELLS:
        raise BadInputError(f"a context of {capacity} cells can't be played: {MOST_CELLS} are the most")
    clock = Clock()
    engine = SimulatedEngine(clock=clock)  # no time is spent: what work took is in the readings already
    sequence = engine.add_cache(max(1, capacity), cell_bytes=cell_bytes).sequence(0)
    source = TraceSource([turn.reading for turn in turns])
    governor = Governor(engine, source=source, config=config, clock=clock, jitter=turns[0].jitter)
    played: list[Turn] = []
    governor.observe(played.append)
    for number, turn in enumerate(turns):
        clock.machine_s = turn.reading.time_s
        _resize(engine, turn.cache.total_bytes // cell_bytes)
        sequence.running = 2 * turn.cache.lossless_bytes <= turn.cache.trimmable_bytes
        if number == 0:
            _give_up(engine, config, turn.cache, cell_bytes)
        governor.limit(turn.cache_limit)
        governor.step()
    governor.close()
    return played


def _resize(engine: SimulatedEngine, cells: int) -> None:
    more = cells - engine.caches[1].sequence(0).next_position
    if more > 0:
        engine.decode(more)
    elif more < 0:
        engine.truncate(cells)


def _give_up(engine: SimulatedEngine, config: GovernorConfig, cache: CacheSnapshot, cell_bytes: int) -> None:
    """Begin with so many cells away: the oldest after the sinks."""
    cells = (cache.masked_bytes + cache.lost_bytes) // cell_bytes
    if cells:
        part = Range(config.sink_cells, config.sink_cells + cells)
        engine.apply(Plan(steps=(Step(verb=Verb.MASK, cache=1, sequence=0, ranges=(part,)),)))


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """What a run of turns comes to. What was given up is what the law asked for; what came back is what was
    seen to."""

    seconds: float
    mode_s: dict[str, float]
    """Time in each mode that was entered."""
    trims: int
    bytes_given_up: int
    restores: int
    """Slices one after the other are one."""
    bytes_restored: int
    direction_changes: int
    """How often a trim followed a restore, or the other way round."""
    min_live_share: float
    """Least share of the context that was live."""
    missing_bytes: int
    """Masked or lost at the last turn."""
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
    acts = [turn for turn in turns if turn.decision.action is not Action.NONE]
    trims = [turn for turn in acts if turn.decision.action is Action.TRIM]
    onset_s = next((turn.reading.time_s for turn in turns if short(thresholds, turn.reading)), None)
    after = [turn.reading.time_s for turn in trims if onset_s is not None and turn.reading.time_s >= onset_s]
    last = turns[-1].cache
    return Account(
        seconds=_seconds(turns[-1].reading.time_s - start_s),
        mode_s=_mode_s(turns),
        trims=len(trims),
        bytes_given_up=sum(turn.decision.n_bytes for turn in trims),
        restores=_restores(turns),
        bytes_restored=_bytes_restored(turns),
        direction_changes=sum(a.decision.action is not b.decision.action for a, b in pairwise(acts)),
        min_live_share=round(min(_live_share(turn.cache) for turn in turns), 4),
        missing_bytes=last.masked_bytes + last.lost_bytes,
        first_trim_s=_seconds(trims[0].reading.time_s - start_s) if trims else None,
        onset_s=None if onset_s is None else _seconds(onset_s - start_s),
        onset_to_trim_s=_seconds(after[0] - onset_s) if after and onset_s is not None else None,
        trims_before_onset=len(trims) - len(after),
    )


def _restores(turns: Sequence[Turn]) -> int:
    actions = [Action.NONE, *(turn.decision.action for turn in turns)]
    return sum(a is not Action.RESTORE and b is Action.RESTORE for a, b in pairwise(actions))


def _bytes_restored(turns: Sequence[Turn]) -> int:
    """A restore is asked for as a whole, slice by slice: what came shows in the next turn."""
    return sum(
        max(0, turn.cache.masked_bytes - after.cache.masked_bytes)
        for turn, after in pairwise(turns)
        if turn.decision.action is Action.RESTORE
    )


def _mode_s(turns: Sequence[Turn]) -> dict[str, float]:
    """Time from each turn to the next, added up by the mode that the turn led to."""
    spent: dict[str, float] = {}
    for turn, after in pairwise(turns):
        gap_s = after.reading.time_s - turn.reading.time_s
        mode = turn.decision.mode.value
        spent[mode] = spent.get(mode, 0.0) + (gap_s if gap_s <= LONGEST_GAP_S else 0.0)
    return {mode: _seconds(seconds) for mode, seconds in spent.items()}


def _live_share(cache: CacheSnapshot) -> float:
    return cache.live_bytes / cache.total_bytes if cache.total_bytes else 1.0


def _seconds(seconds: float) -> float:
    return round(seconds, 3)
