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
        look_again: Callable[[bool], None],
        plenty_bytes: Callable[[int], int],
    ) -> None:
        """`look_again(low)` asks for newer readings, soon where headroom is low anywhere: below
        `plenty_bytes` of a limit."""
        self._own = own
        self._ranks = ranks
        self._age_s = age_s
        self._look_again = look_again
        self._plenty_bytes = plenty_bytes

    @property
    def name(self) -> str:
        """See PressureSource."""
        return f"{self._own.name} and the workers'"

    def read(self) -> Reading:
        """See PressureSource. Asks for newer ones of the others."""
        own = self._own.read()
        seen = own if self._age_s() > OLD_S else with_others(own, self._ranks())
        self._look_again(any(self._is_low(level) for level in seen.levels))
        return seen

    def _is_low(self, level: Level) -> bool:
        known = level.headroom_bytes is not None and level.limit_bytes is not None
        return known and (level.headroom_bytes or 0) < self._plenty_bytes(level.limit_bytes or 0)

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
