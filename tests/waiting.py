"""How tests wait: for what another thread or process brings about, not for time."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 300.0
"""Long past anything that a busy machine does (a process stands still for 2 s, a Python child needs 10 s to
start), and costs nothing where all is well."""


def until(
    condition: Callable[[], object], what: str = "it did not come about", wait_s: float = PATIENCE_S
) -> None:
    """Return as soon as the `condition` holds; fails with `what` where it doesn't for so long."""
    end_s = time.monotonic() + wait_s
    while True:
        last = time.monotonic() >= end_s  # before the look: who stood still until then looks once more
        if condition():
            return
        assert not last, what
        time.sleep(0.01)
