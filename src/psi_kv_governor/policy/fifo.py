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
    """What came into the cache first goes first; what was restored came last.

    Until something is restored or recomputed this is `window`: tokens come in in the order of their
    positions. After that it spares what was brought back, so that memory which comes and goes in waves does
    not carry the same range to the disk and back each time.
    """

    name: ClassVar[str] = "fifo"
    source: ClassVar[str] = "first in, first out"
    needs: ClassVar[frozenset[Kind]] = frozenset({"arrivals"})
    scattered: ClassVar[bool] = False

    def score(self, blocks: Sequence[Range], next_position: int, evidence: Evidence) -> Values:
        """Arrival of the newest cell of each block, shape (len(blocks),)."""
        del next_position
        return without_gaps(highest(blocks, evidence.arrivals))
