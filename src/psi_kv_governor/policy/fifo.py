"""First in, first out of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from psi_kv_governor.cache import Evidence, Kind, Range, Values
from psi_kv_governor.policy.base import Policy
from psi_kv_governor.policy.pool import highest, without_gaps


@dataclass(frozen=True)
class Fifo(Policy):
    """What came into the cache first goes first, whatever its position.

    Tokens come in in the order of their positions, so this is `window` until cells are written anew: a
    context that was shifted, copied or decoded again. Unmasking writes nothing, and is no arrival.
    """

    name: ClassVar[str] = "fifo"
    source: ClassVar[str] = "first in, first out"
    needs: ClassVar[frozenset[Kind]] = frozenset({"arrivals"})
    scattered: ClassVar[bool] = False

    def score(self, blocks: Sequence[Range], next_position: int, evidence: Evidence) -> Values:
        """Arrival of the newest cell of each block, shape (len(blocks),)."""
        del next_position
        return without_gaps(highest(blocks, evidence.arrivals))
