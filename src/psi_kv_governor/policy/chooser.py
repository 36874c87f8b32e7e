"""A policy at work on one sequence: what is protected, what goes, and what is worth most to have back."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import numpy as np

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.ledger import LIVE, Ledger
from psi_kv_governor.policy.base import Evidence, Policy, Range
from psi_kv_governor.policy.registry import POLICIES
from psi_kv_governor.policy.select import Protection, Scored, score, trimmable, without
from psi_kv_governor.policy.window import Window

LEAST_PAGES = 6
"""Pages that a lone block fills in the tensor with the shortest rows. A block that begins and ends within a
page keeps the whole of both: of six pages one in the mean, so five sixths of the bytes come free."""
MOST_BLOCKS = 256
"""Blocks of a full context: each may become a file of the store, and half of the usual 1,024 open files stay
with the program."""


def check_served(policy: Policy, evidence: Evidence, *, asked_for: bool = False) -> None:
    """Raises BadInputError when the cache can't give what the policy needs, naming what can be used.

    Not for the default, which nobody need have asked for: a `Chooser` takes `window` in its place and says
    so, unless it was certainly `asked_for`.
    """
    why = _why_not_served(policy, evidence)
    if why and (asked_for or not _is_default(policy)):
        served = [name for name, other in POLICIES.items() if not _why_not_served(other, evidence)]
        raise BadInputError(
            f"the policy {policy.name} can't be used with this cache: {why}; use {', '.join(served)}"
        )


def _why_not_served(policy: Policy | type[Policy], evidence: Evidence) -> str:
    return next(filter(None, map(evidence.why_not, sorted(policy.needs))), "")


def _is_default(policy: Policy) -> bool:
    return policy.name == GovernorConfig().policy


def block_size(policy: Policy, block_cells: int, row_bytes: int, capacity: int) -> int:
    """Cells of a block: the least multiple of `block_cells` with which LEAST_PAGES and MOST_BLOCKS hold.

    `row_bytes` are those of the shortest row, `capacity` the cells of the whole context. A policy whose
    blocks lie side by side keeps `block_cells`.
    """
    if not policy.scattered:
        return block_cells
    least = max(block_cells, -(-LEAST_PAGES * mmap.PAGESIZE // row_bytes), -(-capacity // MOST_BLOCKS))
    return -(-least // block_cells) * block_cells


class Chooser:
    """Chooses ranges of one sequence by `policy`, and remembers what it thought of each position.

    A policy that fails is somebody's mistake and no reason to be killed for want of memory: the oldest
    blocks go then, and `complain` is told why.
    """

    def __init__(
        self,
        policy: Policy,
        evidence: Evidence,
        ledger: Ledger,
        config: GovernorConfig,
        *,
        row_bytes: int,
        complain: Callable[[str], None] = lambda why: None,
    ) -> None:
        self.policy = policy
        if _is_default(policy) and (why := _why_not_served(policy, evidence)):
            complain(f"the policy {policy.name} can't be used with this cache ({why}): the oldest blocks go")
            self.policy = Window()
        self.head_cells = 0
        """Length of the system prompt, with what the chat template puts around it."""
        self.marked: tuple[Range, ...] = ()
        """What the caller protects: positions, whatever tokens are decoded there."""
        self.block_cells = block_size(self.policy, config.block_cells, row_bytes, ledger.capacity)
        self._evidence = evidence
        self._ledger = ledger
        self._config = config
        self._complain = complain
        self._worth = np.full(ledger.capacity, -np.inf)

    @property
    def protection(self) -> Protection:
        """What no policy may give up now."""
        return Protection(
            sink_cells=max(self._config.sink_cells, self.head_cells),
            window_cells=self._config.window_cells,
            marked=self.marked,
        )

    def protect(self, positions: Range) -> None:
        """Never give up `positions` until they are released by `unprotect`."""
        self.marked = (*self.marked, positions)

    def unprotect(self, positions: Range) -> None:
        """Take the caller's protection off `positions`."""
        self.marked = tuple(rest for mark in self.marked for rest in without(mark, positions))

    def trimmable(self) -> int:
        """Live cells that are not protected."""
        return trimmable(list(self._ledger.ranges(LIVE)), len(self._ledger), self.protection)

    def choose(self, cells: int) -> list[Range]:
        """The ranges to give up for `cells` cells (see `Scored.lowest`), at most so many in whole blocks of
        the configuration: the law counts on that for its floor and its budget."""
        if cells <= 0:
            return []
        try:
            scored = self._score(self.policy)
        except Exception as error:
            self._complain(f"the policy {self.policy.name} failed ({error}): the oldest blocks go instead")
            scored = self._score(Window())
        for block, worth in zip(scored.blocks, scored.scores, strict=True):
            self._worth[block.start : block.stop] = worth
        step = self._config.block_cells
        return scored.lowest(cells, -(-cells // step) * step)

    def worth(self, part: Range) -> float:
        """Mean of the last known scores of `part`, of which the highest comes back first; -inf where a
        position was never scored."""
        return float(self._worth[part.start : part.stop].mean()) if part.cells > 0 else -np.inf

    def _score(self, policy: Policy) -> Scored:
        return score(
            policy,
            list(self._ledger.ranges(LIVE)),
            len(self._ledger),
            self._evidence,
            protection=self.protection,
            block_cells=self.block_cells,
        )
