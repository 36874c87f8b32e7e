"""The files of a memory cgroup by version, and the file pages that its memory.stat tells of.

Kernel: Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Stat(NamedTuple):
    """File pages as a memory.stat tells them."""

    droppable_bytes: int = 0
    """Not mapped, less half of what is active beside them."""
    mapped_bytes: int = 0
    """Mapped by anybody."""
    stuck_bytes: int = 0
    """Dirty, being written, or locked."""
    refaults: int = 0


class StatLines:
    """The lines of a memory.stat that tell what nobody would miss; v1 has a prefix to those that include the
    cgroups below."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = [name.encode() for name in names]
        self._lines = re.compile(rb"^(%b) (\d{1,20})\n" % b"|".join(self._names), re.MULTILINE)

    def read(self, text: bytes) -> Stat:
        """Zeros where the text does not tell."""
        values = {name: int(number) for name, number in self._lines.findall(text)}
        inactive, active, mapped, shared, dirty, writing, locked, refaults = (
            values.get(name, 0) for name in self._names
        )
        mapped = max(0, mapped - shared)
        droppable = max(0, inactive + active - mapped - max(0, active - mapped) // 2)
        return Stat(droppable, min(mapped, inactive + active), dirty + writing + locked, refaults)


class Kind(NamedTuple):
    """The files of a version of cgroups."""

    limits: tuple[str, ...]
    usage: str
    stat: StatLines
    events: str


V2 = Kind(
    ("memory.max", "memory.high"),
    "memory.current",
    StatLines(
        (
            "inactive_file",
            "active_file",
            "file_mapped",
            "shmem",
            "file_dirty",
            "file_writeback",
            "unevictable",
            "workingset_refault_file",
        )
    ),
    "memory.events.local",
)
"""`memory.high` counts as a limit: above it every allocation is slowed down."""

V1 = Kind(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    StatLines(
        (
            "total_inactive_file",
            "total_active_file",
            "total_mapped_file",
            "total_shmem",
            "total_dirty",
            "total_writeback",
            "total_unevictable",
            "total_workingset_refault_file",
        )
    ),
    "",
)
"""The lines with `total_` include the cgroups below, as the limit does. Nothing tells when it was met."""
