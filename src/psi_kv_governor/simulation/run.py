"""Runs of the governor itself against a simulated machine, or along a recorded trace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import msgspec

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control.room import line_bytes, plenty_bytes
from psi_kv_governor.engines.simulated import CELL_BYTES, SimulatedEngine
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.governor import Governor
from psi_kv_governor.pressure.reading import Reading
from psi_kv_governor.pressure.trace import TraceSource
from psi_kv_governor.simulation.machine import Guest, Limit, Machine
from psi_kv_governor.simulation.outcome import Outcome, summed_up
from psi_kv_governor.simulation.process import Acts, Clock, Model, Program
from psi_kv_governor.simulation.scenario import Scenario

STEP_S = 0.05
"""Step of the simulated machine. Readings come at multiples of it, as close to poll_s as they can."""

MOST_SECONDS = 21_600.0
"""Every step is kept for the plot: six hours take 0.2 GB."""

BASE_SHARE = 0.25
"""What the model and the runtime take of the limit, whatever the cache does."""

CACHE_SHARE = 0.35
"""What the full cache takes of the limit: a long context on a small board."""


@dataclass
class Track:
    """What happened, step by step, for the plot."""

    time_s: list[float] = field(default_factory=list)
    stall: list[float] = field(default_factory=list)
    headroom: list[float] = field(default_factory=list)
    live_cells: list[int] = field(default_factory=list)
    masked_cells: list[int] = field(default_factory=list)
    lost_cells: list[int] = field(default_factory=list)
    stall_ungoverned: list[float] = field(default_factory=list)
    """Stall of the same steps without the governor; empty for a replayed trace."""

    def add(self, time_s: float, stall: float, headroom: float | None, engine: SimulatedEngine) -> None:
        """Take down one step. A headroom that is not known is NaN, and so a gap in the plot."""
        counts = engine.caches[1].sequence(0).counts
        self.time_s.append(time_s)
        self.stall.append(stall)
        self.headroom.append(math.nan if headroom is None else headroom)
        self.live_cells.append(counts.live)
        self.masked_cells.append(counts.masked)
        self.lost_cells.append(counts.lost)


def check_seconds(seconds: float) -> None:
    """Raises BadInputError where it is not from 1 to MOST_SECONDS."""
    if not 1.0 <= seconds <= MOST_SECONDS:  # also refuses NaN
        raise BadInputError(f"cannot simulate {seconds} seconds: give 1 to {MOST_SECONDS:g}")


def simulate(
    scenario: Scenario, config: GovernorConfig, *, seed: int, seconds: float, ctx: int
) -> tuple[Outcome, Track]:
    """Run `scenario` for so many seconds with a context of `ctx` cells, with and without the governor.

    Raises BadInputError when `seconds` is not from 1 to MOST_SECONDS, or the policy is unknown.
    """
    check_seconds(seconds)
    governed = _Run(scenario, config, seed=seed, seconds=seconds, ctx=ctx, governed=True)
    ungoverned = _Run(scenario, config, seed=seed, seconds=seconds, ctx=ctx, governed=False)
    for run in (governed, ungoverned):
        run.play()
    governed.track.stall_ungoverned = ungoverned.track.stall
    acts = governed.program.acts.list
    outcome = summed_up(scenario.name, scenario.about, acts, governed.track, governed.onset_s)
    return msgspec.structs.replace(
        outcome,
        stall_s=round(governed.machine.stall_s, 3),
        stall_ungoverned_s=round(ungoverned.machine.stall_s, 3),
        tokens=governed.program.tokens,
        tokens_ungoverned=ungoverned.program.tokens,
        written_bytes=governed.program.written_bytes,
    ), governed.track


def replay(
    name: str, readings: Sequence[Reading], config: GovernorConfig, *, ctx: int
) -> tuple[Outcome, Track]:
    """Lead a full context of `ctx` cells along recorded readings. What it returns does not change them.

    Raises BadInputError when there is nothing to replay.
    """
    if not readings:
        raise BadInputError(f"{name} holds no readings: record one first")
    start_s = readings[0].time_s
    played = [msgspec.structs.replace(one, time_s=round(one.time_s - start_s, 6)) for one in readings]
    clock = Clock()
    engine = SimulatedEngine(clock=clock, spend=clock.spend)
    engine.add_cache(ctx).sequence(0).running = True
    engine.decode(ctx)
    acts, track = Acts(engine), Track()
    onset_s: float | None = None
    governor = Governor(engine, source=TraceSource(played), config=config, clock=clock, jitter=0.0)
    governor.subscribe(acts)
    for reading in played:
        clock.machine_s = reading.time_s
        governor.step()
        track.add(reading.time_s, reading.some, _headroom(reading), engine)
        if onset_s is None and short(config, reading):
            onset_s = reading.time_s
    governor.close()
    outcome = summed_up(name, "a recorded trace, replayed", acts.list, track, onset_s)
    stall_s = sum(reading.some * reading.interval_s for reading in readings)
    written = engine.snapshot().written_bytes
    return msgspec.structs.replace(outcome, stall_s=round(stall_s, 3), written_bytes=written), track


def short(config: GovernorConfig, reading: Reading) -> bool:
    """Whether memory is short in one reading alone: stall over `high` without plenty, or no headroom."""
    stalled = reading.interval_s > 0.0 and reading.some >= config.high
    headroom, limit = reading.headroom_bytes, reading.limit_bytes
    if headroom is None or not limit:
        return stalled
    return headroom < line_bytes(config, limit) or (stalled and headroom <= plenty_bytes(config, limit))


class _Run:
    """A machine with a context that is being decoded."""

    def __init__(
        self,
        scenario: Scenario,
        config: GovernorConfig,
        *,
        seed: int,
        seconds: float,
        ctx: int,
        governed: bool,
    ) -> None:
        # Seeded with text, so that scenarios differ; the text is hashed by SHA-512, alike in each process.
        neighbour = scenario.neighbour(seconds, Random(f"{seed} {scenario.name} neighbour"))
        limit_bytes = round(ctx * CELL_BYTES / CACHE_SHARE)
        noise = Random(f"{seed} {scenario.name} noise")
        self.machine = Machine([Limit(limit_bytes)], [Guest(neighbour)], noise)
        model = Model(round(BASE_SHARE * limit_bytes), ctx, CELL_BYTES)
        self.program = Program(self.machine, model, config if governed else None)
        self.track = Track()
        self.onset_s: float | None = None
        """When memory first was short by the thresholds of the configuration."""
        self._config = config
        self._steps = math.ceil(seconds / STEP_S)

    def play(self) -> None:
        machine, limit_bytes = self.machine, self.machine.limits[0].limit_bytes
        low, plenty = line_bytes(self._config, limit_bytes), plenty_bytes(self._config, limit_bytes)
        for _ in range(self._steps):
            machine.advance(STEP_S)
            headroom_bytes = machine.headroom_bytes(0)
            stalled = machine.stall >= self._config.high and headroom_bytes <= plenty
            if self.onset_s is None and (stalled or headroom_bytes < low):
                self.onset_s = machine.time_s
            self.program.advance(STEP_S)
            self.track.add(machine.time_s, machine.stall, machine.headroom, self.program.engine)
        self.program.close()


def _headroom(reading: Reading) -> float | None:
    if reading.headroom_bytes is None or not reading.limit_bytes:
        return None
    return reading.headroom_bytes / reading.limit_bytes
