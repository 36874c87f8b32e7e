"""The neighbours of the simulated cache: how much memory each wants, when, and why that is worth a look.

Demands are shares of the memory limit, so each scenario is the same at every size of the cache.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from random import Random
from types import MappingProxyType
from typing import NamedTuple, Protocol

from psi_kv_governor._nearest import unknown
from psi_kv_governor.errors import BadInputError


class Neighbour(Protocol):
    """Another process on the machine."""

    def demand(self, time_s: float, room: float) -> float:
        """Share of the limit that it wants; `room` is what the model and its cache leave of it."""


class Scenario(NamedTuple):
    """One kind of neighbour."""

    name: str
    about: str
    """What it does, in a line."""
    neighbour: Callable[[float, Random], Neighbour]
    """Makes it, for a run of so many seconds."""


class Curve:
    """Demand along straight lines between (seconds, share) points, again and again after `period_s`."""

    def __init__(self, points: Sequence[tuple[float, float]], period_s: float | None = None) -> None:
        self._times = [time_s for time_s, _ in points]
        self._shares = [share for _, share in points]
        self._period_s = period_s

    def demand(self, time_s: float, room: float) -> float:
        """The share on the line at `time_s`, whatever the room."""
        del room
        if self._period_s is not None:
            time_s %= self._period_s
        after = bisect_right(self._times, time_s)
        if after == 0:
            return self._shares[0]
        if after == len(self._times):
            return self._shares[-1]
        left, right = self._times[after - 1], self._times[after]
        weight = (time_s - left) / (right - left)
        return self._shares[after - 1] * (1.0 - weight) + self._shares[after] * weight


class Hostile:
    """Attacks and lies low as it likes. In an attack it takes all room, what is returned too, and more.

    The lulls are 4 to 10 s: many are just long enough for the cache to be restored before the next attack.
    """

    LULL_SHARE = 0.10
    OVER = 0.08
    """How far above the limit it pushes: about 85 % of the time is then lost to stalls."""

    def __init__(self, seconds: float, random: Random) -> None:
        self._turns_s: list[float] = []
        turn_s = 0.0
        while turn_s <= seconds:
            lull = len(self._turns_s) % 2 == 0
            turn_s += random.uniform(4.0, 10.0) if lull else random.uniform(3.0, 8.0)
            self._turns_s.append(turn_s)

    def demand(self, time_s: float, room: float) -> float:
        """Next to nothing in a lull, more than there is in an attack."""
        attacks = bisect_right(self._turns_s, time_s) % 2 == 1
        return max(self.LULL_SHARE, room + self.OVER) if attacks else self.LULL_SHARE


def _calm(seconds: float, random: Random) -> Neighbour:
    return Curve([(0.0, 0.25)])


def _ramp(seconds: float, random: Random) -> Neighbour:
    points = ((0.10, 0.20), (0.50, 0.60), (0.70, 0.60), (0.80, 0.20))
    return Curve([(part * seconds, share) for part, share in points])


def _spike(seconds: float, random: Random) -> Neighbour:
    # A process taking 250 MiB in 0.1 s was measured; 0.4 of the limit in 0.3 s is of that kind.
    start_s, stop_s = 0.2 * seconds, 0.2 * seconds + min(10.0, 0.2 * seconds)
    return Curve([(start_s, 0.25), (start_s + 0.3, 0.65), (stop_s, 0.65), (stop_s + 0.3, 0.25)])


def _sawtooth(seconds: float, random: Random) -> Neighbour:
    # Builds do this: each linker takes memory for a while, is gone at once, and the next one follows.
    return Curve([(12.0, 0.25), (27.0, 0.60), (27.2, 0.25), (30.0, 0.25)], period_s=30.0)


def _sustained(seconds: float, random: Random) -> Neighbour:
    return Curve([(0.1 * seconds, 0.25), (0.1 * seconds + 3.0, 0.58)])


_ALL = (
    Scenario("calm", "a neighbour that stays small", _calm),
    Scenario("ramp", "grows slowly, stays, and goes", _ramp),
    Scenario("spike", "takes 40 % of the memory in 0.3 s, for a few seconds", _spike),
    Scenario("sawtooth", "grows for 15 s and is gone, every 30 s", _sawtooth),
    Scenario("sustained", "takes more than there is, and keeps it", _sustained),
    Scenario("hostile", "eats what is returned, strikes when it was restored", Hostile),
)

SCENARIOS: Mapping[str, Scenario] = MappingProxyType({scenario.name: scenario for scenario in _ALL})
"""Every scenario by its name, gentle ones first."""


def get_scenario(name: str) -> Scenario:
    """The scenario called `name`. Raises BadInputError that names the known ones."""
    try:
        return SCENARIOS[name]
    except KeyError:
        raise BadInputError(unknown("scenario", name, SCENARIOS)) from None
