"""Governors on one simulated machine: what each says is heard by the others at once."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from psi_kv_governor.pressure.reading import Level, Neighbour, Standing


class Seat:
    """A `Neighbourhood` in memory. All seats that share `table` hear of each other."""

    def __init__(self, name: str, table: dict[str, Neighbour]) -> None:
        self._name = name
        self._table = table
        self._said = Neighbour(id=name, levels=())

    def say(self, levels: Sequence[Level], standing: Standing) -> None:
        """How this governor stands."""
        self._say(
            Neighbour(
                id=self._name,
                levels=tuple(level.name for level in levels),
                work=self._said.work,
                **msgspec.structs.asdict(standing),
            )
        )

    def say_work(self, spans: Sequence[tuple[float, float]]) -> None:
        """When this governor was parking or restoring."""
        self._say(msgspec.structs.replace(self._said, work=tuple(spans)))

    def _say(self, said: Neighbour) -> None:
        self._said = self._table[self._name] = said

    def read(self, levels: Sequence[Level]) -> tuple[Neighbour, ...]:
        """The others. On one machine, all share all levels."""
        del levels
        return tuple(other for name, other in self._table.items() if name != self._name)

    def close(self) -> None:
        """Say no more. Safe to call twice."""
        self._table.pop(self._name, None)
