"""What follows from the state between two turns: whether there is room, and when the next is due."""

from __future__ import annotations

import msgspec

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control.decision import Mode
from psi_kv_governor.control.law import FASTEST_BYTES_PER_S, pause_s, soonest_s
from psi_kv_governor.control.past import Look
from psi_kv_governor.control.room import line_bytes, spare_bytes
from psi_kv_governor.control.state import LawState
from psi_kv_governor.pressure.reading import MACHINE, Bound, Bounds, Reading

_CALM_TURN_S, _IDLE_TURN_S = 1.0, 2.0
"""Longest between two turns of the whole loop while nothing happens, and while nobody decodes either."""

_GRAIN_BYTES = 256 << 10
"""Headroom moves by so much without anybody taking anything: each processor's batch of charged pages."""


def has_room(config: GovernorConfig, state: LawState, reading: Reading) -> bool:
    """Whether there is no pressure now, and headroom above the low line."""
    quiet = state.quiet_since_s is not None
    if state.mode is Mode.TRIMMING or (state.mode is Mode.HOLDING and not quiet):
        return False
    spare = spare_bytes(config, reading)
    return spare is None or spare > 0


def turn_s(state: LawState, last_used_s: float) -> float:
    """How long a calm turn holds, with caches that were used at `last_used_s`."""
    return _CALM_TURN_S if state.time_s - last_used_s < _IDLE_TURN_S else _IDLE_TURN_S


def nothing_new(config: GovernorConfig, state: LawState, reading: Reading, last_used_s: float) -> bool:
    """Calm before and calm now: the law is asked once in `turn_s` then. A whole turn takes 0.4 ms of a
    processor whose caches others have filled meanwhile, a look alone 0.1 ms."""
    return (
        state.mode is Mode.CALM
        and reading.time_s - state.time_s < turn_s(state, last_used_s)
        and pause_s(config, reading) >= config.poll_s / 2
        and reading.some < config.low
    )


def bounds(config: GovernorConfig, state: LawState, reading: Reading, last_used_s: float) -> Bounds | None:
    """How far the machine may go from `reading` without a decision being due; None where each reading counts.

    It counts unless the machine is calm and no level is near its line. The machine is left alone for as
    long as the fastest process needs for half of what is above its line; a cgroup is not, as somebody may
    lower its limit. A level may lose an eighth of what is above its line,
    but not pass into the part in which every reading is remembered (its fall is looked at there): in that
    part it may have lost what is no more than the count's own grain.
    """
    if state.mode is not Mode.CALM or state.quiet_since_s is None or reading.some >= config.low:
        return None
    watched_bytes = int(config.poll_s * FASTEST_BYTES_PER_S)  # see `nothing_new`
    levels: dict[str, Bound] = {}
    lines: list[Bound] = []
    for level in reading.levels:
        if level.headroom_bytes is None or not level.limit_bytes:
            continue
        line = line_bytes(config, level.limit_bytes)
        spare = level.headroom_bytes - line
        if spare <= line:
            return None
        bound = Bound(
            until_s=reading.time_s + (soonest_s(spare) if level.name == MACHINE else 0.0),
            slack_bytes=min(spare // 8, max(_GRAIN_BYTES, spare - watched_bytes)),
        )
        if level.name == MACHINE or level.name.startswith("/"):
            levels[level.name] = bound
        else:  # the line of another program, which moves with the machine and the nearest cgroup
            lines.append(bound)
    return Bounds(
        until_s=state.time_s + turn_s(state, last_used_s),
        levels={name: Bound(*map(min, bound, bound, *lines)) for name, bound in levels.items()},
    )


def glanced(state: LawState, time_s: float) -> LawState:
    """`state` after a glance at which nothing had changed: its last look, once more at that time."""
    if not state.looks or time_s <= state.looks[-1].time_s:
        return state
    last = state.looks[-1]
    again = Look(time_s, time_s - last.time_s, last.rooms)
    return msgspec.structs.replace(state, looks=(*state.looks, again))
