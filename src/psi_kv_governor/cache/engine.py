"""The protocol that every engine speaks: describe, snapshot, apply, evidence. One folder an engine."""

from __future__ import annotations

from typing import Protocol

from psi_kv_governor.cache.evidence import Evidence, Kind
from psi_kv_governor.cache.plan import Plan, Result
from psi_kv_governor.cache.snapshot import Description, Snapshot


class Engine(Protocol):
    """KV caches that can give memory back.

    Calls may come from any thread, one at a time. None of them ever changes what an address of a cache
    contains (invariant 1), and none raises for what the machine refuses: that stands in a `Result`.
    EngineError is for an engine that is gone (its process ended, its model was closed).
    """

    def describe(self) -> Description:
        """What the engine is and can do here. May change when the first cache appears."""

    def snapshot(self) -> Snapshot:
        """All caches now. Cheap: asked for at every turn of the loop. Raises EngineError."""

    def apply(self, plan: Plan) -> Result:
        """Carry out `plan`, and tell what was really done. Raises EngineError."""

    def collect(self, kinds: frozenset[Kind]) -> None:
        """Gather from now on what has to be gathered while tokens are decoded. Costs nothing for keys."""

    def evidence(self, cache: int, sequence: int) -> Evidence:
        """What a policy can ask about one sequence. Raises EngineError where there is none such."""

    def close(self) -> None:
        """Leave the caches alone from now on: all masks are taken off. Safe to call twice."""
