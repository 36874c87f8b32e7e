"""Between two turns of a calm machine the loop only glances at it."""

from __future__ import annotations

import math

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import LawState, bounds, glanced, nothing_new
from psi_kv_governor.pressure.reading import Bounds, Reading
from psi_kv_governor.sensor import Sensor


class Calm:
    """Looks whether a reading is due at all: most of what a governor costs is what follows from one.

    A glance comes as often as a reading would, and sees stall and a loss of headroom at the same moment.
    """

    def __init__(self, config: GovernorConfig, sensor: Sensor) -> None:
        self._config, self._sensor = config, sensor
        self._bounds: Bounds | None = None
        self._pause_s = 0.0
        self._time_s = -math.inf
        self.last_used_s = math.inf
        """When somebody decoded in the caches, as of the last turn."""

    def glance(self) -> float | None:
        """The pause until the next one, where nothing is new; None where a reading is due."""
        if self._bounds is None:
            return None
        time_s = self._sensor.glance(self._bounds)
        if time_s is None:
            self._bounds = None
            return None
        self._time_s = time_s
        return self._pause_s

    def caught_up(self, state: LawState) -> LawState:
        """`state` as it would be if the glances since had been readings."""
        return glanced(state, self._time_s)

    def nothing_new(self, state: LawState, reading: Reading) -> bool:
        """Whether a turn can end with its reading."""
        return nothing_new(self._config, state, reading, self.last_used_s)

    def goes_by(self, state: LawState, reading: Reading, pause_s: float) -> float:
        """What the next glances are compared with, after `pause_s` each. Gives that."""
        known = self._sensor.glances
        self._bounds = bounds(self._config, state, reading, self.last_used_s) if known else None
        self._pause_s = pause_s
        return pause_s
