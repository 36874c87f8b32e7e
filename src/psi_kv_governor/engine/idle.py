"""The engine of a model that can't be governed: it does nothing, and says why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from psi_kv_governor.engine.base import Capabilities, RestoreResult, TrimResult, Worth
from psi_kv_governor.engine.paper import PaperEvidence
from psi_kv_governor.errors import EngineError
from psi_kv_governor.ledger import Ledger
from psi_kv_governor.policy.base import Range
from psi_kv_governor.store.base import Store


class IdleEngine:
    """Keeps the governor's interface usable where nothing can be given up."""

    name = "none"
    cell_bytes = 0
    row_bytes = 1

    def __init__(self, capabilities: Capabilities) -> None:
        self.capabilities = capabilities
        self.ledger = Ledger(0)
        self.evidence = PaperEvidence(self.ledger)

    def at_safe_point(self, patience_s: float = math.inf) -> AbstractContextManager[None]:
        return nullcontext()

    def trim(self, ranges: Sequence[Range], store: Store | None, deadline_s: float = math.inf) -> TrimResult:
        raise EngineError(f"this cache can't give up a range: {self.capabilities.spill.why}")

    def restore(
        self,
        max_cells: int,
        store: Store | None,
        worth: Worth | None = None,
        patience_s: float = math.inf,
    ) -> RestoreResult:
        return RestoreResult(cells=0, seconds=0.0, missing=0)

    def release(self) -> int:
        return 0
