"""How a governor stands, as one answer."""

from __future__ import annotations

import msgspec

from psi_kv_governor.control.decision import Mode


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """How things stand. Counts are in cells, `some` and `full` in shares of time."""

    mode: Mode
    source: str
    some: float
    full: float
    headroom_bytes: int | None
    live_cells: int
    spilled_cells: int
    lost_cells: int
    cell_bytes: int
    store_bytes: int

    @property
    def holes(self) -> int:
        """Positions of the context that are not in the cache."""
        return self.spilled_cells + self.lost_cells

    @property
    def live_bytes(self) -> int:
        """Bytes of the rows in the cache."""
        return self.live_cells * self.cell_bytes
