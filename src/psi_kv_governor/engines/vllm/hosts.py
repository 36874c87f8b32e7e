"""The readings of all hosts as one: the law sees the level that is worst off, wherever it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from psi_kv_governor.engines.vllm.messages import About
from psi_kv_governor.pressure.reading import Level, PressureSource, Reading

OLD_S = 5.0
"""A reading that is older says nothing of now: an idle engine brings one a second."""


class HostsSource:
    """A `PressureSource`: this host's own, and what workers on others sent with their steps."""

    def __init__(
        self,
        own: PressureSource,
        ranks: Callable[[], Mapping[int, About]],
        age_s: Callable[[], float],
        look_again: Callable[[], None],
    ) -> None:
        self._own = own
        self._ranks = ranks
        self._age_s = age_s
        self._look_again = look_again

    @property
    def name(self) -> str:
        """See PressureSource."""
        return f"{self._own.name} and the workers'"

    def read(self) -> Reading:
        """See PressureSource. Asks for newer ones of the others."""
        reading = self._own.read()
        self._look_again()
        if self._age_s() > OLD_S:
            return reading
        return with_others(reading, self._ranks())

    def close(self) -> None:
        """See PressureSource."""
        self._own.close()


def with_others(own: Reading, ranks: Mapping[int, About]) -> Reading:
    """`own` with the levels that only others see, named after the rank that sees them first."""
    seen = {(level.name, level.limit_bytes) for level in own.levels}
    levels = list(own.levels)
    for rank, about in sorted(ranks.items()):
        for level in about.reading.levels if about.reading else ():
            if (level.name, level.limit_bytes) not in seen:
                seen.add((level.name, level.limit_bytes))
                levels.append(msgspec.structs.replace(level, name=f"{level.name} of rank {rank}"))
    return msgspec.structs.replace(own, levels=tuple(levels))


def far_levels(own: tuple[Level, ...], ranks: Mapping[int, About]) -> bool:
    """Whether some rank sees a level that this process does not."""
    seen = {(level.name, level.limit_bytes) for level in own}
    return any(
        (level.name, level.limit_bytes) not in seen
        for about in ranks.values()
        for level in (about.reading.levels if about.reading else ())
    )
