"""How tests wait: for what another thread or process brings about, not for time."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(condition: Callable[[], object], what: str = "it did not come about", wait_s: float = 90) -> None:
    """Return as soon as the `condition` holds; fails with `what` where it doesn't for so long."""
    end_s = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < end_s, what
        time.sleep(0.01)
