"""Control and policy on a simulated engine, and what is taken down of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import Action, CacheSnapshot, LawState, Turn, decide, pause_s
from psi_kv_governor.engine.simulated import SimulatedEngine, SimulatedStore
from psi_kv_governor.ledger import LIVE, LOST, SPILLED
from psi_kv_governor.policy import get_policy
from psi_kv_governor.policy.chooser import Chooser
from psi_kv_governor.pressure.reading import Reading
from psi_kv_governor.simulation.outcome import Deed


@dataclass
class Track:
    """What happened, step by step, for the plot."""

    time_s: list[float] = field(default_factory=list)
    stall: list[float] = field(default_factory=list)
    headroom: list[float] = field(default_factory=list)
    live_cells: list[int] = field(default_factory=list)
    spilled_cells: list[int] = field(default_factory=list)
    lost_cells: list[int] = field(default_factory=list)
    stall_ungoverned: list[float] = field(default_factory=list)
    """Stall of the same steps without the governor; empty for a replayed trace."""

    def add(self, time_s: float, stall: float, headroom: float | None, engine: SimulatedEngine) -> None:
        """Take down one step. A headroom that is not known is NaN, and so a gap in the plot."""
        ledger = engine.ledger
        self.time_s.append(time_s)
        self.stall.append(stall)
        self.headroom.append(math.nan if headroom is None else headroom)
        self.live_cells.append(ledger.count(LIVE))
        self.spilled_cells.append(ledger.count(SPILLED))
        self.lost_cells.append(ledger.count(LOST))


class Pilot:
    """Control and policy on a simulated engine, wired as the governor wires them on a real one."""

    def __init__(self, config: GovernorConfig, engine: SimulatedEngine) -> None:
        self.deeds: list[Deed] = []
        self.turn: Turn | None = None
        """The last step, whole."""
        self._config = config
        self._engine = engine
        self._chooser = Chooser(
            get_policy(config.policy), engine.evidence, engine.ledger, config, row_bytes=engine.row_bytes
        )
        self._store = SimulatedStore(config.store_limit_bytes) if config.store == "disk" else None
        self._state = LawState()

    def resize(self, cells: int) -> None:
        """Bring the context to `cells`: tokens were decoded, or its end was forgotten."""
        more = cells - len(self._engine.ledger)
        if more > 0:
            self._engine.grow(more)
        elif more < 0:
            self._engine.truncate(cells, self._store)

    def give_up(self, spilled: int, lost: int) -> None:
        """Begin with so many cells away: those that the policy would choose."""
        for cells, store in ((spilled, self._store), (lost, None)):
            if cells > 0:
                self._engine.trim(self._chooser.choose(cells), store)

    def step(self, reading: Reading, cache_limit: float | None = None) -> float:
        """Decide and act. Gives the time until the next reading."""
        config, cache = self._config, self._snapshot()
        decision, self._state = decide(config, self._state, reading, cache, cache_limit)
        self.turn = Turn(reading=reading, cache=cache, cache_limit=cache_limit, decision=decision)
        seconds = 0.0
        if decision.action is Action.TRIM:
            seconds = self._trim(reading.time_s, decision.cells, decision.reason)
        elif decision.action is Action.RESTORE:
            restored = self._engine.restore(decision.cells, self._store, self._chooser.worth)
            seconds = restored.seconds
            self._note(reading.time_s, Action.RESTORE, restored.cells, 0, decision.reason)
        return max(pause_s(config, reading), seconds)

    def _snapshot(self) -> CacheSnapshot:
        ledger = self._engine.ledger
        return CacheSnapshot(
            live_cells=ledger.count(LIVE),
            spilled_cells=ledger.count(SPILLED),
            lost_cells=ledger.count(LOST),
            trimmable_cells=self._chooser.trimmable(),
            cell_bytes=self._engine.cell_bytes,
        )

    def _trim(self, time_s: float, cells: int, reason: str) -> float:
        result = self._engine.trim(self._chooser.choose(cells), self._store)
        self._note(time_s, Action.TRIM, result.cells, result.bytes_returned, reason)
        return result.seconds

    def _note(self, time_s: float, action: Action, cells: int, n_bytes: int, reason: str) -> None:
        deed = Deed(
            time_s=time_s,
            action=action.value,
            cells=cells,
            bytes_returned=n_bytes,
            live_cells=self._engine.ledger.count(LIVE),
            total_cells=len(self._engine.ledger),
            reason=reason,
        )
        self.deeds.append(deed)
