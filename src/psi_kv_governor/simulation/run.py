"""Runs of the real control and policy code against a machine on paper, or along a recorded trace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

import msgspec

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engine.simulated import CELL_BYTES, SimulatedEngine
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.pressure.reading import Reading
from psi_kv_governor.simulation.machine import CACHE_SHARE, Machine
from psi_kv_governor.simulation.outcome import Outcome, summed_up
from psi_kv_governor.simulation.pilot import Pilot, Track
from psi_kv_governor.simulation.scenario import Scenario

STEP_S = 0.05
"""Step of the simulated machine. Readings come at multiples of it, as close to poll_s as they can."""

MOST_SECONDS = 21_600.0
"""Every step is kept for the plot: six hours take 0.2 GB, and 11 s for each scenario."""

FILLED = 0.75
"""Share of the context that is in the cache at the start; decoding fills the rest."""

TOKENS_PER_S = 10.0
"""Decoding speed of the calm machine; while it stalls, nothing is decoded."""


def simulate(
    scenario: Scenario, config: GovernorConfig, *, seed: int, seconds: float, ctx: int
) -> tuple[Outcome, Track]:
    """Run `scenario` for so many seconds with a context of `ctx` cells, with and without the governor.

    Raises BadInputError when `seconds` is not from 1 to MOST_SECONDS, or the policy is unknown.
    """
    if not 1.0 <= seconds <= MOST_SECONDS:  # also refuses NaN
        raise BadInputError(f"cannot simulate {seconds} seconds: give 1 to {MOST_SECONDS:g}")
    governed = _Run(scenario, config, seed=seed, seconds=seconds, ctx=ctx)
    pilot = Pilot(config, governed.engine)
    next_s = 0.0
    while not governed.over:
        governed.advance()
        if governed.machine.time_s >= next_s - STEP_S / 2:
            next_s = governed.machine.time_s + pilot.step(governed.machine.read())
    ungoverned = _Run(scenario, config, seed=seed, seconds=seconds, ctx=ctx)
    while not ungoverned.over:
        ungoverned.advance()
    governed.track.stall_ungoverned = ungoverned.track.stall
    outcome = summed_up(scenario.name, scenario.about, pilot.deeds, governed.track, governed.onset_s)
    return msgspec.structs.replace(
        outcome,
        stall_s=round(governed.machine.stall_s, 3),
        stall_ungoverned_s=round(ungoverned.machine.stall_s, 3),
        tokens=governed.tokens,
        tokens_ungoverned=ungoverned.tokens,
    ), governed.track


def replay(
    name: str, readings: Sequence[Reading], config: GovernorConfig, *, ctx: int
) -> tuple[Outcome, Track]:
    """Lead a full context of `ctx` cells along recorded readings. What it returns does not change them.

    Raises BadInputError when there is nothing to replay.
    """
    if not readings:
        raise BadInputError(f"{name} holds no readings: record one first")
    engine = _engine(config, ctx)
    engine.grow(ctx)
    pilot = Pilot(config, engine)
    track = Track()
    start_s = readings[0].time_s
    onset_s: float | None = None
    for recorded in readings:
        reading = msgspec.structs.replace(recorded, time_s=round(recorded.time_s - start_s, 6))
        pilot.step(reading)
        headroom = _headroom(reading)
        track.add(reading.time_s, reading.some, headroom, engine)
        stall = reading.some if reading.interval_s else 0.0  # the first reading of a source covers no time
        if onset_s is None and _short(config, stall, headroom):
            onset_s = reading.time_s
    outcome = summed_up(name, "a recorded trace, replayed", pilot.deeds, track, onset_s)
    stall_s = sum(reading.some * reading.interval_s for reading in readings)
    return msgspec.structs.replace(outcome, stall_s=round(stall_s, 3)), track


class _Run:
    """A machine with a context that is being decoded."""

    def __init__(
        self, scenario: Scenario, config: GovernorConfig, *, seed: int, seconds: float, ctx: int
    ) -> None:
        # Seeded with text, so that scenarios differ; the text is hashed by SHA-512, alike in each process.
        neighbour = scenario.neighbour(seconds, Random(f"{seed} {scenario.name} neighbour"))
        limit_bytes = round(ctx * CELL_BYTES / CACHE_SHARE)
        self.engine = _engine(config, ctx)
        self.engine.grow(math.ceil(FILLED * ctx))
        self.machine = Machine(limit_bytes, neighbour, Random(f"{seed} {scenario.name} noise"))
        self.track = Track()
        self.tokens = 0
        self.onset_s: float | None = None
        """When memory first was short by the thresholds of the configuration."""
        self._config = config
        self._steps_left = math.ceil(seconds / STEP_S)
        self._ctx = ctx
        self._decoded = 0.0

    @property
    def over(self) -> bool:
        return self._steps_left <= 0

    def advance(self) -> None:
        machine, engine = self.machine, self.engine
        machine.advance(STEP_S, engine.resident_bytes)
        self._steps_left -= 1
        self._decoded += TOKENS_PER_S * STEP_S * (1.0 - machine.stall)
        new = int(self._decoded) - self.tokens
        self.tokens += new
        fits = min(new, self._ctx - len(engine.ledger))
        if fits:
            engine.grow(fits)
        self.track.add(machine.time_s, machine.stall, machine.headroom, engine)
        if self.onset_s is None and _short(self._config, machine.stall, machine.headroom):
            self.onset_s = machine.time_s


def _engine(config: GovernorConfig, ctx: int) -> SimulatedEngine:
    return SimulatedEngine(ctx, blob_cells=config.block_cells)


def _headroom(reading: Reading) -> float | None:
    if reading.headroom_bytes is None or not reading.limit_bytes:
        return None
    return reading.headroom_bytes / reading.limit_bytes


def _short(config: GovernorConfig, stall: float, headroom: float | None) -> bool:
    if headroom is None:
        return stall >= config.high
    return headroom < config.headroom_low or (stall >= config.high and headroom <= config.headroom_plenty)
