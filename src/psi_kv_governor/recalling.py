"""Tells the engine what may change places while something is masked: recall."""

from __future__ import annotations

import logging
from typing import Protocol, runtime_checkable

from psi_kv_governor.cache import Engine, Recall, Recalled, Snapshot
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.policy.planner import Planner
from psi_kv_governor.policy.select import head_of

_log = logging.getLogger("psi_kv_governor")


@runtime_checkable
class Recalls(Protocol):
    """An engine, besides, that exchanges parked cells for live ones by itself."""

    def recall(self, settings: Recall) -> None:
        """Do so as `settings` say, until told otherwise.

        Raises:
            EngineError: the engine is gone.
        """

    def recalled(self) -> Recalled:
        """Return what came of it so far.

        Raises:
            EngineError: the engine is gone.
        """


class Recalling:
    """Keeps the engine's settings up to date: what is protected, and that nothing comes in while memory is
    about to be gone."""

    def __init__(self, engine: Engine, planner: Planner, config: GovernorConfig) -> None:
        self._engine = engine if isinstance(engine, Recalls) else None
        self._snapshot = engine.snapshot
        self._planner = planner
        self._config = config
        self._said = Recall()
        self._acute = False

    def turn(self, snapshot: Snapshot, *, acute: bool) -> None:
        """One turn of the loop.

        Raises:
            EngineError: the engine is gone.
        """
        self._acute = acute
        if self._engine is None:
            return
        heads = [
            head_of(one.head_cells, one.next_position, self._config.head_share)
            for cache in snapshot.caches
            for one in cache.sequences
        ]
        settings = Recall(
            mode=self._config.recall,
            sink_cells=max(self._config.sink_cells, *heads, 0),
            window_cells=self._config.window_cells,
            marked=tuple(mark for marks in self._planner.marks.values() for mark in marks),
            paused=acute,
            bytes_per_s=self._config.recall_bytes_per_s,
        )
        if settings != self._said:
            self._engine.recall(settings)
            self._said = settings

    def now(self) -> None:
        """Tell it before the loop does: something is given up by hand, or was marked. Raises nothing."""
        try:
            if self._engine is not None:
                self.turn(self._snapshot(), acute=self._acute)
        except Exception as error:
            _log.debug("recall is not told: %s", error)

    def done(self) -> Recalled | None:
        """Return what came of it; None where the engine can't do it, or is gone. Raises nothing."""
        try:
            return self._engine.recalled() if self._engine is not None else None
        except Exception as error:
            _log.debug("recall tells nothing: %s", error)
            return None
