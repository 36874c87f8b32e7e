"""Pages that were read from a disk one by one, each when it was first looked at."""

from __future__ import annotations

import resource
from collections.abc import Callable


def major_faults_of(do: Callable[[], object]) -> int:
    """How many of them this process waited for in `do`: what was read by name before is not among them."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    do()
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt - before
