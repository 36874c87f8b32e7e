"""How many bytes can still be taken before a limit bites: the cgroup's, its ancestors', or the machine's.

Kernel: Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst, filesystems/proc.rst.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from psi_kv_governor.pressure.cgroup import OwnCgroups
from psi_kv_governor.pressure.kernel_file import KernelFile

_NO_LIMIT_V1_BYTES = 2**62
"""v1 says "none" with the largest whole number of pages below 2^63, which depends on the page size."""

_STAT_SHARE = 0.02
"""Most of the time that may go into reading memory.stat. Here a read takes 3 us, and so it is read at every
look; the kernel adds up all processors and all cgroups below for it, which takes longer on a big machine."""


_UNLIMITED_EVERY_S = 1.0
"""How often to look for a limit where there is none: most of the cgroups above have none, and may lack the
files altogether. Without six such, a reading takes 69 us and not 158 at 50 Hz, and 147 us and not 233 at
10 Hz, when hardly anything of it is in the processor's caches any more."""


class Headroom(NamedTuple):
    """Room under one limit."""

    headroom_bytes: int
    limit_bytes: int
    source: str
    """The folder or file that sets the limit."""


class Room(Protocol):
    """Tells the headroom."""

    def read(self) -> Headroom | None:
        """The headroom now; None where nothing tells."""

    def close(self) -> None:
        """Give back descriptors. Safe to call twice."""


class HeadroomReader:
    """Reads the smallest headroom among the own cgroups, all their ancestors, and the machine.

    A limit that is not there, or goes away while running, simply does not count. One that is changed while
    running counts at the next look; one that is set where there was none, within `_UNLIMITED_EVERY_S`. Files
    stay open until `close`, and are opened again after it.
    """

    def __init__(
        self, cgroups: OwnCgroups, root: Path = Path("/"), clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._meminfo = KernelFile(root / "proc/meminfo")
        self._clock = clock
        self._levels: list[_Level] = []
        self._limited: list[_Level] = []
        self._look_again_s = -math.inf
        if cgroups.unified is not None:
            self._levels += [_level_v2(folder, clock) for folder in cgroups.unified.lineage]
        if cgroups.memory_v1 is not None:
            self._levels += [_level_v1(folder, clock) for folder in _charged_v1(cgroups.memory_v1.lineage)]

    def read(self) -> Headroom | None:
        """The headroom that bites first; None where neither a cgroup nor the machine tells."""
        now_s = self._clock()
        if now_s >= self._look_again_s:
            self._limited, self._look_again_s = self._levels, now_s + _UNLIMITED_EVERY_S
        found = [(room, level) for level in self._limited if (room := level.read()) is not None]
        self._limited = [level for _, level in found]
        machine = _machine(self._meminfo)
        rooms = [room for room, _ in found] if machine is None else [machine, *(room for room, _ in found)]
        return min(rooms, default=None)

    def close(self) -> None:
        """Give the descriptors back. Safe to call twice."""
        self._meminfo.close()
        for level in self._levels:
            level.close()


def machine_headroom(meminfo: Path) -> Headroom | None:
    """MemAvailable of MemTotal, less the file pages that somebody has mapped.

    MemAvailable counts all but a few file pages as free. Those of a model that is mapped are its weights:
    to take them makes every token read them again.
    """
    file = KernelFile(meminfo)
    try:
        return _machine(file)
    finally:
        file.close()


_MEMINFO = re.compile(rb"^(MemTotal|MemAvailable|Mapped|Shmem):\s+(\d{1,20}) kB\n", re.MULTILINE)


def _machine(meminfo: KernelFile) -> Headroom | None:
    parsed = parse_meminfo(meminfo.read() or b"")
    return None if parsed is None else Headroom(*parsed, str(meminfo.path))


def parse_meminfo(text: bytes) -> tuple[int, int] | None:
    """Room and size of the machine's memory in bytes; None where the text does not tell."""
    values = _values(_MEMINFO, text)
    if b"MemAvailable" not in values or b"MemTotal" not in values:
        return None
    mapped = max(0, values.get(b"Mapped", 0) - values.get(b"Shmem", 0))
    return max(0, values[b"MemAvailable"] - mapped) * 1024, values[b"MemTotal"] * 1024


def _values(pattern: re.Pattern[bytes], text: bytes) -> dict[bytes, int]:
    """The numbers of the lines that `pattern` takes as a name and a number."""
    return {name: int(number) for name, number in pattern.findall(text)}


class StatLines:
    """The lines of a memory.stat that tell what nobody would miss. `names` are those of inactive, active and
    mapped file pages and of shared memory, in this order."""

    def __init__(self, *names: bytes) -> None:
        self._names = names
        self._lines = re.compile(rb"^(%b) (\d{1,20})\n" % b"|".join(names), re.MULTILINE)

    def droppable_bytes(self, text: bytes) -> int:
        """File pages that are not mapped, less half of what is active beside them; 0 where the text does not
        tell."""
        values = _values(self._lines, text)
        inactive, active, mapped, shared = (values.get(name, 0) for name in self._names)
        mapped = max(0, mapped - shared)
        return max(0, inactive + active - mapped - max(0, active - mapped) // 2)


STAT_V2 = StatLines(b"inactive_file", b"active_file", b"file_mapped", b"shmem")
STAT_V1 = StatLines(b"total_inactive_file", b"total_active_file", b"total_mapped_file", b"total_shmem")


class _Level:
    """One cgroup with the files that tell its room.

    Room is the limit minus the working set. Of what is charged, file pages that are not mapped count as free,
    as in the kernel's own MemAvailable; of those that are active, only half. A cgroup that reads files for
    long is at its limit for ever and half of its pages are active: that is no shortage, and when they are
    missed it shows as stall.

    Mapped pages have to be asked for: using them through a page table does not make them active until the
    kernel first looks for something to drop. Measured in a cgroup of 220 MiB without swap: 93 MiB of weights,
    read over and over, were all inactive until the limit was met. As free pages they made the headroom 98 MiB
    in the last moment before the thrashing began, and 5 MiB is what it was. (Shared memory is mapped too,
    and no file.)
    """

    def __init__(
        self,
        folder: Path,
        limits: tuple[str, ...],
        usage: str,
        stat: StatLines,
        clock: Callable[[], float],
    ) -> None:
        self._folder = folder
        self._limits = [KernelFile(folder / name) for name in limits]
        self._usage = KernelFile(folder / usage)
        self._stat = KernelFile(folder / "memory.stat")
        self._stat_lines = stat
        self._clock = clock
        self._droppable_bytes = 0
        self._stat_again_s = 0.0

    def read(self) -> Headroom | None:
        """The room under this cgroup's own limit; None where it has none."""
        limits = [limit for file in self._limits if (limit := file.number()) is not None]
        limit_bytes = min(limits, default=_NO_LIMIT_V1_BYTES)
        if limit_bytes >= _NO_LIMIT_V1_BYTES:
            return None
        usage_bytes = self._usage.number()
        if usage_bytes is None:
            return None
        working_set_bytes = max(0, usage_bytes - self._droppable())
        return Headroom(max(0, limit_bytes - working_set_bytes), limit_bytes, str(self._folder))

    def _droppable(self) -> int:
        """File pages nobody misses, in bytes: looked up as often as `_STAT_SHARE` allows."""
        before_s = self._clock()
        if before_s >= self._stat_again_s:
            self._droppable_bytes = self._stat_lines.droppable_bytes(self._stat.read() or b"")
            after_s = self._clock()
            self._stat_again_s = after_s + (after_s - before_s) / _STAT_SHARE
        return self._droppable_bytes

    def close(self) -> None:
        for file in (*self._limits, self._usage, self._stat):
            file.close()


def _level_v2(folder: Path, clock: Callable[[], float]) -> _Level:
    """A v2 cgroup. `memory.high` counts as a limit: above it every allocation is slowed down."""
    return _Level(folder, ("memory.max", "memory.high"), "memory.current", STAT_V2, clock)


def _level_v1(folder: Path, clock: Callable[[], float]) -> _Level:
    """A v1 cgroup, whose counters with `total_` include the cgroups below, as its limit does."""
    return _Level(folder, ("memory.limit_in_bytes",), "memory.usage_in_bytes", STAT_V1, clock)


def _charged_v1(lineage: tuple[Path, ...]) -> Iterator[Path]:
    """The v1 cgroups that are charged for this process: ancestors only where they say they are.

    Without `memory.use_hierarchy` (the default of the root before Linux 5.11) a child's pages are not
    the parent's, nor is the parent's limit the child's.
    """
    yield lineage[0]
    for folder in lineage[1:]:
        file = KernelFile(folder / "memory.use_hierarchy")
        alone = file.number() == 0
        file.close()
        if alone:
            return
        yield folder
