"""The one quantile of the tree."""

from __future__ import annotations

import math
from collections.abc import Sequence


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of `values` do not pass (nearest rank).

    Raises ValueError without values: there is no such value, and 0 would be a good one.
    """
    if not values:
        raise ValueError("no values, hence no quantile")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
