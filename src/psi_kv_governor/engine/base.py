"""What the governor asks of an engine, and what it gets back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import msgspec

from psi_kv_governor.ledger import Ledger
from psi_kv_governor.policy.base import Evidence, Range
from psi_kv_governor.store.base import Store

Worth = Callable[[Range], float]
"""What a policy last thought of a range of positions: the highest comes back first."""


class Capability(msgspec.Struct, frozen=True):
    """Whether an engine can do a step here, and where it can't, why and what to do."""

    able: bool
    why: str = ""


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """The steps of the ladder that this model on this build can do."""

    release: Capability
    """Return the pages of cells nobody uses."""
    spill: Capability
    """Move a middle range to the store and put it back exactly."""
    recompute: Capability
    """Decode lost tokens again in place."""


class TrimResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one trim did."""

    cells: int
    """Cells given up, spilled and evicted together."""
    spilled: int
    """Of these, the ones that wait in the store."""
    bytes_returned: int
    """Resident bytes that the operating system has again: counted in the page tables, not computed."""
    seconds: float
    problem: str = ""
    """Why less than asked was done, or why cells were evicted and not spilled; empty when all went well."""


class RestoreResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one restore did."""

    cells: int
    """Cells put back, bit for bit as they were."""
    seconds: float
    missing: int
    """Cells of the context that are still not in the cache."""
    problem: str = ""
    """Why less came back than asked, for instance a blob that failed its checksum."""


class Engine(Protocol):
    """A KV cache that can give memory back. Calls may come from any thread; each waits for a safe point."""

    @property
    def name(self) -> str: ...

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def cell_bytes(self) -> int:
        """Bytes of one cell: its K and V rows in every layer."""

    @property
    def row_bytes(self) -> int:
        """Bytes of the shortest row of a cell: so many rows fill a page that is to be returned."""

    @property
    def ledger(self) -> Ledger:
        """Where each token of the governed sequence is. Read it, never write it."""

    @property
    def evidence(self) -> Evidence:
        """What a policy can ask about the tokens."""

    def at_safe_point(self, patience_s: float = math.inf) -> AbstractContextManager[None]:
        """Nothing but the caller changes the cache inside. Calls of this protocol may be made there.

        A decode that still runs after `patience_s` is interrupted, and run again afterwards.
        """

    def trim(self, ranges: Sequence[Range], store: Store | None, deadline_s: float = math.inf) -> TrimResult:
        """Give up the live cells of `ranges`: spill to `store` (evict where there is none), then release.

        What is not in the store after `deadline_s` is evicted.
        """

    def restore(
        self,
        max_cells: int,
        store: Store | None,
        worth: Worth | None = None,
        patience_s: float = math.inf,
    ) -> RestoreResult:
        """Put up to `max_cells` spilled cells back, each into the cell it came from.

        With `worth` the ranges of which it says most come first, so that a part of all is worth most. For
        `patience_s` see `at_safe_point`; between two blobs a decode may run.
        """

    def release(self) -> int:
        """Return the pages of cells nobody uses, unless a long decode is running: next time, then. Gives the
        resident bytes returned."""
