"""How many bytes can still be taken before a limit bites: the cgroup's, its ancestors', or the machine's.

Kernel: Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst, filesystems/proc.rst.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from psi_kv_governor.pressure.cgroup import OwnCgroups

_NO_LIMIT_V1_BYTES = 2**62
"""v1 says "none" with the largest whole number of pages below 2^63, which depends on the page size."""


class Headroom(NamedTuple):
    """Room under one limit."""

    headroom_bytes: int
    limit_bytes: int
    source: str
    """The folder or file that sets the limit."""


class HeadroomReader:
    """Reads the smallest headroom among the own cgroups, all their ancestors, and the machine.

    A limit that is not there, or goes away while running, simply does not count.
    """

    def __init__(self, cgroups: OwnCgroups, root: Path = Path("/")) -> None:
        self._meminfo = root / "proc/meminfo"
        self._levels: list[tuple[Callable[[Path], Headroom | None], Path]] = []
        if cgroups.unified is not None:
            self._levels += [(_headroom_v2, folder) for folder in cgroups.unified.lineage]
        if cgroups.memory_v1 is not None:
            self._levels += [(_headroom_v1, folder) for folder in _charged_v1(cgroups.memory_v1.lineage)]

    def read(self) -> Headroom | None:
        """The headroom that bites first; None where neither a cgroup nor the machine tells."""
        found = [headroom for look, folder in self._levels if (headroom := look(folder)) is not None]
        machine = machine_headroom(self._meminfo)
        if machine is not None:
            found.append(machine)
        return min(found, default=None)


def machine_headroom(meminfo: Path) -> Headroom | None:
    """MemAvailable of MemTotal: what the kernel thinks can be taken without swapping."""
    values = _table(meminfo)
    try:
        return Headroom(values["MemAvailable:"] * 1024, values["MemTotal:"] * 1024, str(meminfo))
    except KeyError:
        return None


def _headroom_v2(folder: Path) -> Headroom | None:
    """Room in one v2 cgroup. `memory.high` counts as a limit: above it every allocation is slowed down."""
    limits = [_number(folder / "memory.max"), _number(folder / "memory.high")]
    limit_bytes = min((limit for limit in limits if limit is not None), default=None)
    if limit_bytes is None:
        return None
    return _room(folder, limit_bytes, _number(folder / "memory.current"), "inactive_file")


def _headroom_v1(folder: Path) -> Headroom | None:
    """Room in one v1 cgroup."""
    limit_bytes = _number(folder / "memory.limit_in_bytes")
    if limit_bytes is None or limit_bytes >= _NO_LIMIT_V1_BYTES:
        return None
    return _room(folder, limit_bytes, _number(folder / "memory.usage_in_bytes"), "total_inactive_file")


def _room(folder: Path, limit_bytes: int, usage_bytes: int | None, inactive_file: str) -> Headroom | None:
    """Limit minus the working set.

    Of what is charged, only inactive file pages count as free: nobody has used them again since they were
    read, so the kernel drops them first and nobody misses them. Active file pages are left in: they are
    being used (the model's own weights are), and dropping them would only make them be read again.
    """
    if usage_bytes is None:
        return None
    working_set_bytes = max(0, usage_bytes - _table(folder / "memory.stat").get(inactive_file, 0))
    return Headroom(max(0, limit_bytes - working_set_bytes), limit_bytes, str(folder))


def _charged_v1(lineage: tuple[Path, ...]) -> Iterator[Path]:
    """The v1 cgroups that are charged for this process: ancestors only where they say they are.

    Without `memory.use_hierarchy` (the default of the root before Linux 5.11) a child's pages are not
    the parent's, nor is the parent's limit the child's.
    """
    yield lineage[0]
    for folder in lineage[1:]:
        if _number(folder / "memory.use_hierarchy") == 0:
            return
        yield folder


def _number(path: Path) -> int | None:
    """The one number in a file; None for `max`, for anything else, and where there is no such file."""
    try:
        text = path.read_bytes().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and len(text) <= 20 else None


def _table(path: Path) -> dict[str, int]:
    """The `name number` lines of a file; empty where it cannot be read."""
    try:
        text = path.read_bytes().decode("ascii", "replace")
    except OSError:
        return {}
    values = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[1].isdecimal() and len(words[1]) <= 20:
            values[words[0]] = int(words[1])
    return values
