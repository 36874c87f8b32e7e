"""A program with a model on the simulated machine: it decodes, and the governor itself works on its cache."""

from __future__ import annotations

import math
from typing import NamedTuple

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.simulated import SimulatedEngine
from psi_kv_governor.events import Event, Restored, Trimmed
from psi_kv_governor.governor import Governor
from psi_kv_governor.pressure.neighbours import Neighbourhood
from psi_kv_governor.pressure.reading import Reading
from psi_kv_governor.simulation.machine import Machine
from psi_kv_governor.simulation.outcome import Act

FILLED = 0.75
"""Share of the context that is in the cache at the start; decoding fills the rest."""

TOKENS_PER_S = 10.0
"""Decoding speed of the calm machine; while it stalls, nothing is decoded."""

_SAME_RESTORE_S = 1.0
"""Slices of a restore that are no further apart are one act."""


class Model(NamedTuple):
    """What a governed process holds."""

    base_bytes: int
    """Of the model and the runtime, whatever the cache does."""
    cells: int
    cell_bytes: int

    @property
    def cache_bytes(self) -> int:
        return self.cells * self.cell_bytes


class Clock:
    """Time of one process: that of its machine, or later while it is at work."""

    def __init__(self) -> None:
        self.machine_s = 0.0
        self.busy_s = 0.0
        """Until when it is at work."""

    def __call__(self) -> float:
        return max(self.machine_s, self.busy_s)

    def spend(self, seconds: float) -> None:
        """Work for so long."""
        self.busy_s = self() + seconds


class Acts:
    """A subscriber that takes down what a governor did to the one sequence of its engine."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self.list: list[Act] = []
        self._engine = engine

    def __call__(self, event: Event) -> None:
        if isinstance(event, Trimmed):
            self._note(event.time_s, "trim", event.cells, event.bytes_returned, event.reason)
        elif isinstance(event, Restored):
            self._note(event.time_s, "restore", event.cells, 0, "")

    def _note(self, time_s: float, action: str, cells: int, n_bytes: int, reason: str) -> None:
        last = self.list[-1] if self.list else None
        began_s = time_s
        if last and action == "restore" == last.action and time_s - last.until_s <= _SAME_RESTORE_S:
            began_s, cells = last.time_s, cells + last.cells
            self.list.pop()
        counts = self._engine.caches[1].sequence(0).counts
        self.list.append(
            Act(
                time_s=round(began_s, 6),
                until_s=round(time_s, 6),
                action=action,
                cells=cells,
                bytes_returned=n_bytes,
                live_cells=counts.live,
                total_cells=counts.used,
                reason=reason,
            )
        )


class Program:
    """One process. Without a `config` nobody governs it."""

    def __init__(
        self,
        machine: Machine,
        model: Model,
        config: GovernorConfig | None,
        *,
        name: str = "model",
        jitter: float = 0.0,
        neighbours: Neighbourhood | None = None,
        busy: tuple[float, float] = (0.0, math.inf),
    ) -> None:
        """`busy` are the seconds from and until which it decodes; before and after it is idle."""
        self.name = name
        self.tokens = 0
        self.killed = False
        self.machine = machine
        self._model = model
        self._clock = Clock()
        self.engine = SimulatedEngine(clock=self._clock, spend=self._clock.spend)
        self._cache = self.engine.add_cache(model.cells, cell_bytes=model.cell_bytes, name=name)
        self.engine.decode(math.ceil(FILLED * model.cells))
        self.acts = Acts(self.engine)
        """What its governor did."""
        self._busy = busy
        self._decoded = 0.0
        self._next_s = 0.0
        self._governor: Governor | None = None
        machine.processes.append(self)
        if config is not None:
            self._governor = Governor(
                self.engine,
                source=_Source(self),
                config=config,
                name=name,
                clock=self._clock,
                jitter=jitter,
                neighbours=neighbours,
            )
            self._governor.subscribe(self.acts)

    @property
    def resident_bytes(self) -> int:
        """The model and its cache."""
        if self.killed:
            return 0
        return self._model.base_bytes + self._cache.resident_bytes

    @property
    def written_bytes(self) -> int:
        return self.engine.snapshot().written_bytes

    def kill(self) -> None:
        """It is gone for good."""
        self.killed = True
        self.close()

    def close(self) -> None:
        """Its governor ends."""
        if self._governor is not None:
            self._governor.close()
            self._governor = None

    def advance(self, step_s: float) -> None:
        """Decode for a step that the machine has made, and then let the governor have its turn."""
        now_s = self._clock.machine_s = self.machine.time_s
        if self.killed or now_s < self._clock.busy_s:
            return
        if self._busy[0] <= now_s < self._busy[1]:
            self._decode(step_s)
        if self._governor is not None and now_s >= self._next_s - step_s / 2 and now_s >= self._clock.busy_s:
            self._next_s = now_s + self._governor.step()

    def _decode(self, step_s: float) -> None:
        self._decoded += TOKENS_PER_S * step_s * (1.0 - self.machine.stall)
        new = int(self._decoded) - self.tokens
        if new:
            self.tokens += new
            new = min(new, self._model.cells - self._cache.sequence(0).counts.used)
        self.engine.decode(new)


class _Source:
    """The machine's pressure as one process reads it: stall since its last reading."""

    name = "simulated machine"

    def __init__(self, program: Program) -> None:
        self._program = program
        self._read_s: float | None = None
        self._totals_s = [0.0] * len(program.machine.limits)

    def read(self) -> Reading:
        machine = self._program.machine
        interval_s = 0.0 if self._read_s is None else machine.time_s - self._read_s
        levels, self._totals_s = machine.levels(self._totals_s, interval_s)
        self._read_s = machine.time_s
        return Reading(
            time_s=machine.time_s,
            interval_s=interval_s,
            levels=levels,
            own_resident_bytes=self._program.resident_bytes,
            source=self.name,
        )

    def close(self) -> None:
        """Nothing to give back."""
