"""Trying a configuration out on readings: how often it cries wolf, and how soon it sees the wolf."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control.decision import Action, CacheSnapshot
from psi_kv_governor.control.law import decide
from psi_kv_governor.control.room import line_bytes
from psi_kv_governor.control.state import LawState
from psi_kv_governor.pressure.reading import Reading

LATE_S = 0.05
"""Two looks under pressure: an answer is late by more than that."""

_SAME_ALARM_S = 1.0
"""Alarms closer together are one: a copy of a large file comes in several bursts."""


class Trial(NamedTuple):
    """What the law does with a configuration on what was seen."""

    false_trims: int
    """Alarms on the calm machine, a second or more apart."""
    reactions_s: tuple[float | None, ...]
    """Of each scene, from the neighbour's coming to the first alarm; None where there was none."""


def try_out(
    config: GovernorConfig,
    calm: Sequence[Reading],
    scenes: Sequence[Sequence[Reading]],
    cache: CacheSnapshot,
) -> Trial:
    return Trial(false_trims(config, calm, cache), reactions_s(config, scenes, cache))


def false_trims(
    config: GovernorConfig, calm: Sequence[Reading], cache: CacheSnapshot, most: int | None = None
) -> int:
    """Alarms on the calm machine; with `most`, that is all of them that are counted."""
    return sum(1 for _ in islice(alarms(config, calm, cache), most))


def reactions_s(
    config: GovernorConfig, scenes: Sequence[Sequence[Reading]], cache: CacheSnapshot
) -> tuple[float | None, ...]:
    """Of each scene, from the neighbour's coming to the first alarm."""
    first = [(scene, next(alarms(config, scene, cache), None)) for scene in scenes if scene]
    return tuple(None if alarm_s is None else round(alarm_s - scene[0].time_s, 3) for scene, alarm_s in first)


def alarms(config: GovernorConfig, readings: Sequence[Reading], cache: CacheSnapshot) -> Iterator[float]:
    """When the law asks for a trim, each run of such readings once.

    The law is not told of the trim: cooldown, budget and futility would hide the alarms after the first.
    """
    state, last_s = LawState(), -math.inf
    for reading in readings:
        decision, after = decide(config, state, reading, cache, None)
        if decision.action is not Action.TRIM:
            state = after
            continue
        if reading.time_s - last_s > _SAME_ALARM_S:
            yield reading.time_s
        last_s = reading.time_s


def due(base: GovernorConfig, before: Trial, scenes: Sequence[Sequence[Reading]]) -> list[float]:
    """When each scene has to be answered: `lead_s` before memory is short, or as soon as it was before."""
    played = [scene for scene in scenes if scene]
    return [
        max(_or_never(reaction_s), _short_s(base, scene) - base.lead_s)
        for reaction_s, scene in zip(before.reactions_s, played, strict=True)
    ]


def _short_s(base: GovernorConfig, scene: Sequence[Reading]) -> float:
    """From the neighbour's coming until memory is short by the reading alone; infinite where it never is."""
    for reading in scene:
        low = any(
            level.headroom_bytes < line_bytes(base, level.limit_bytes)
            for level in reading.levels
            if level.headroom_bytes is not None and level.limit_bytes
        )
        if low or (reading.interval_s > 0.0 and reading.some >= base.high):
            return reading.time_s - scene[0].time_s
    return math.inf


def late(trial: Trial, due_s: Sequence[float]) -> bool:
    """Whether a scene is answered too late."""
    pairs = zip(trial.reactions_s, due_s, strict=True)
    return any(_or_never(reaction_s) > due + LATE_S for reaction_s, due in pairs)


def _or_never(reaction_s: float | None) -> float:
    return math.inf if reaction_s is None else reaction_s
