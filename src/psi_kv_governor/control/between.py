"""What follows from the state between two turns: whether there is room, and whether a turn is due at all."""

from __future__ import annotations

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control.decision import Mode
from psi_kv_governor.control.law import pause_s
from psi_kv_governor.control.room import spare_bytes
from psi_kv_governor.control.state import LawState
from psi_kv_governor.pressure.reading import Reading

_CALM_TURN_S = 1.0
"""Longest between two turns of the whole loop while nothing happens."""


def has_room(config: GovernorConfig, state: LawState, reading: Reading) -> bool:
    """Whether there is no pressure now, and headroom above the low line."""
    quiet = state.quiet_since_s is not None
    if state.mode is Mode.TRIMMING or (state.mode is Mode.HOLDING and not quiet):
        return False
    spare = spare_bytes(config, reading)
    return spare is None or spare > 0


def nothing_new(config: GovernorConfig, state: LawState, reading: Reading) -> bool:
    """Calm before and calm now: the law is asked once a second then. A whole turn takes 0.4 ms of a processor
    whose caches others have filled meanwhile, a look alone 0.1 ms."""
    return (
        state.mode is Mode.CALM
        and reading.time_s - state.time_s < _CALM_TURN_S
        and reading.some < config.low
        and pause_s(config, reading) >= config.poll_s / 2
    )
