"""The published method that the governor is compared with: PSI avg10 prunes the middle of the cache.

Once a second it reads `avg10` of `some`; over its threshold everything between the first `keep` and the
last `tail` tokens is removed from the cache's metadata, when that is at least `min_prune` tokens. Nothing
more: no memory is returned, and nothing comes back.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any, NamedTuple

from psi_kv_governor.errors import BadInputError
from psi_kv_governor.events import Trimmed
from psi_kv_governor.sandbox.process_memory import Sample
from psikv_bench.process_memory import own_memory

POLL_S = 1.0
THRESHOLD = 0.10
"""Share of time. That of the governor's own `high`, so that the methods differ and not their settings."""

_SOME_AVG10 = re.compile(rb"^some avg10=(\d{1,3}\.\d\d) ", re.MULTILINE)


def read_avg10(path: Path) -> float:
    """`avg10` of `some` as a share (0 to 1). Raises OSError, and BadInputError for what is no PSI file."""
    match = _SOME_AVG10.search(path.read_bytes())
    if match is None:
        raise BadInputError(f"{path} is no PSI file: it has no `some avg10`")
    return float(match[1]) / 100.0


class Cut(NamedTuple):
    """Positions to remove: from `start` to before `stop`."""

    start: int
    stop: int


class MiddlePruner:
    """Says when and what to remove. What was removed once is not counted again."""

    def __init__(self, pressure_file: Path, keep: int, tail: int, min_prune: int) -> None:
        self._file, self._tail, self._min_prune = pressure_file, tail, min_prune
        self._from = keep
        self._polled_s = float("-inf")
        self.removed_cells = 0

    def prune(self, llm: Any) -> Trimmed | None:
        """The method's whole answer to pressure: `n_tokens` of `llm` stays, and with it the positions."""
        began_s = time.monotonic()
        cut = self.look(began_s, llm.n_tokens)
        if cut is None:
            return None
        before = own_memory()
        llm._ctx.kv_cache_seq_rm(0, cut.start, cut.stop)
        after = own_memory()
        self.removed_cells += cut.stop - cut.start
        now_s = time.monotonic()
        return Trimmed(
            time_s=now_s,
            cells=cut.stop - cut.start,
            masked=0,
            lost=cut.stop - cut.start,
            bytes_returned=_private_bytes(before) - _private_bytes(after),
            seconds=now_s - began_s,
            reason=f"avg10 is at {THRESHOLD:.0%} or above",
        )

    def look(self, time_s: float, next_position: int) -> Cut | None:
        """What to remove at `time_s` of a sequence that ends before `next_position`; None: nothing."""
        if time_s - self._polled_s < POLL_S:
            return None
        self._polled_s = time_s
        cut = Cut(self._from, next_position - self._tail)
        if cut.stop - cut.start < self._min_prune or read_avg10(self._file) < THRESHOLD:
            return None
        self._from = cut.stop
        return cut


def _private_bytes(memory: Sample) -> int:
    return memory.anonymous_bytes + memory.swap_bytes
