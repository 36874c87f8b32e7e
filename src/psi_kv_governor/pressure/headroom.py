"""How many bytes can still be taken before a limit bites: the cgroup's, its ancestors', or the machine's.

Kernel: Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from psi_kv_governor.pressure.cgroup import OwnCgroups
from psi_kv_governor.pressure.counting import Biting, Rate, rest_s
from psi_kv_governor.pressure.kernel_file import PAGE_BYTES, KernelFile
from psi_kv_governor.pressure.kill_lines import KillLine, find_kill_lines
from psi_kv_governor.pressure.memory_stat import V1, V2, Kind, Stat
from psi_kv_governor.pressure.reading import MACHINE, Level
from psi_kv_governor.pressure.whole_machine import WholeMachine, parse_meminfo

_NO_LIMIT_V1_BYTES = 2**62
"""v1 says "none" with the largest whole number of pages below 2^63, which depends on the page size."""

_STAT_SHARE = 0.02
"""Most of the time that may go into reading memory.stat. Here a read takes 3 us, and so it is read at every
look; the kernel adds up all processors and all cgroups below for it, which takes longer on a big machine."""

_UNLIMITED_EVERY_S = 1.0
"""How often to look for a limit where there is none: most of the cgroups above have none, and may lack the
files altogether. Without six such, a reading takes 69 us and not 158 at 50 Hz, and 147 us and not 233 at
10 Hz, when hardly anything of it is in the processor's caches any more."""


_LINES_EVERY_S = 300.0
"""How often to look for programs that kill at a line of theirs: 5 ms with 500 processes."""

_BATCH_PAGES = 64
"""Pages that each processor may hold charged to a cgroup without anybody using them: MEMCG_CHARGE_BATCH, in
the kernel's mm/memcontrol.c. 256 KiB a processor; they are given back before anybody is killed."""


class Headroom(NamedTuple):
    """Room under one limit."""

    headroom_bytes: int
    limit_bytes: int
    source: str
    """The folder or file that sets the limit."""


class Room(Protocol):
    """Tells the headroom."""

    def read(self) -> Headroom | None:
        """The least headroom now; None where nothing tells."""

    def levels(self, own_mapped_bytes: int = 0) -> list[Level]:
        """Everything that has a limit, without its stall. `own_mapped_bytes` are file pages that this process
        has mapped."""

    def steady(self, slack_bytes: Mapping[str, int]) -> bool:
        """Whether each level that is named has at most so much less headroom than when it was last told."""

    def close(self) -> None:
        """Give back descriptors. Safe to call twice."""


class HeadroomReader:
    """Reads the headroom of the own cgroups, all their ancestors, the machine, and the lines of others.

    A limit that is not there, or goes away while running, simply does not count. One that is changed while
    running counts at the next look; one that is set where there was none, within `_UNLIMITED_EVERY_S`. Files
    stay open until `close`, and are opened again after it.
    """

    def __init__(
        self,
        cgroups: OwnCgroups,
        root: Path = Path("/"),
        clock: Callable[[], float] = time.perf_counter,
        *,
        environ: Mapping[str, str] | None = None,
        processors: int | None = None,
    ) -> None:
        self._root = root
        self._environ = os.environ if environ is None else environ
        self._machine = WholeMachine(root, clock)
        self._clock = clock
        self._levels: list[_Level] = []
        self._limited: list[_Level] = []
        self._look_again_s = self._lines_again_s = -math.inf
        self._lines: list[KillLine] = []
        grain_bytes = _BATCH_PAGES * PAGE_BYTES * (processors or os.cpu_count() or 1)
        if cgroups.unified is not None:
            self._levels += [_Level(folder, V2, grain_bytes, clock) for folder in cgroups.unified.lineage]
        if cgroups.memory_v1 is not None:
            self._levels += [
                _Level(folder, V1, grain_bytes, clock) for folder in _charged_v1(cgroups.memory_v1.lineage)
            ]

    def read(self) -> Headroom | None:
        """The headroom with the fewest bytes of a cgroup or the machine; None where none of them tells."""
        rooms = [
            Headroom(level.headroom_bytes, level.limit_bytes, self._source(level))
            for level in (*self._cgroups(0), self._machine.read())
            if level is not None and level.headroom_bytes is not None and level.limit_bytes is not None
        ]
        return min(rooms, default=None)

    def levels(self, own_mapped_bytes: int = 0) -> list[Level]:
        """All that has a limit: the nearest cgroup first, then the machine, then the lines of others."""
        found = self._cgroups(own_mapped_bytes)
        machine = self._machine.read(own_mapped_bytes)
        if machine is None or self._machine.memory is None:
            return found
        now_s = self._clock()
        if now_s >= self._lines_again_s:
            self._lines, self._lines_again_s = (
                find_kill_lines(self._root, self._environ),
                now_s + _LINES_EVERY_S,
            )
        nearest = found[0] if found else machine
        lines = [line.level(self._machine.memory, nearest) for line in self._lines]
        return [*found, machine, *(level for level in lines if level is not None)]

    def steady(self, slack_bytes: Mapping[str, int]) -> bool:
        """See Room. The lines of others move with the machine and the nearest cgroup."""
        now_s = self._clock()
        if now_s >= self._look_again_s:
            if any(level.has_limit() for level in self._levels if level not in self._limited):
                return False
            self._look_again_s = now_s + _UNLIMITED_EVERY_S
        cgroups = (level for level in self._limited if level.name in slack_bytes)
        return all(level.steady(slack_bytes[level.name]) for level in cgroups) and (
            MACHINE not in slack_bytes or self._machine.steady(slack_bytes[MACHINE])
        )

    def _cgroups(self, own_mapped_bytes: int) -> list[Level]:
        now_s = self._clock()
        if now_s >= self._look_again_s:
            self._limited, self._look_again_s = self._levels, now_s + _UNLIMITED_EVERY_S
        found = [
            (told, level) for level in self._limited if (told := level.read(own_mapped_bytes)) is not None
        ]
        self._limited = [level for _, level in found]
        return [told for told, _ in found]

    def _source(self, level: Level) -> str:
        return self._machine.source if level.limit == "MemAvailable" else level.name

    def close(self) -> None:
        """Give the descriptors back. Safe to call twice."""
        self._machine.close()
        for level in self._levels:
            level.close()


def machine_headroom(meminfo: Path) -> Headroom | None:
    """The machine's own, out of its /proc/meminfo."""
    file = KernelFile(meminfo)
    memory = parse_meminfo(file.read() or b"")
    file.close()
    return None if memory is None else Headroom(memory.headroom_bytes, memory.total_bytes, str(meminfo))


_MET = re.compile(rb"^(?:high|max) (\d{1,20})\n", re.MULTILINE)


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

    def __init__(self, folder: Path, kind: Kind, grain_bytes: int, clock: Callable[[], float]) -> None:
        self.name = str(folder)
        self._headroom_bytes = 0
        self._limits = [KernelFile(folder / name) for name in kind.limits]
        self._usage = KernelFile(folder / kind.usage)
        self._stat_file = KernelFile(folder / "memory.stat")
        self._events = KernelFile(folder / kind.events) if kind.events else None
        self._stat_lines = kind.stat
        self._grain_bytes = grain_bytes
        self._clock = clock
        self._stat = Stat()
        self._stat_again_s = 0.0
        self._refaults, self._biting = Rate(), Biting()

    def read(self, own_mapped_bytes: int) -> Level | None:
        """The room under this cgroup's own limit; None where it has none."""
        limit_bytes, limit = self._limit()
        if limit_bytes >= _NO_LIMIT_V1_BYTES:
            return None
        usage_bytes = self._usage.number()
        if usage_bytes is None:
            return None
        stat = self._read_stat()
        self._headroom_bytes = max(0, limit_bytes - max(0, usage_bytes - stat.droppable_bytes))
        return Level(
            name=self.name,
            headroom_bytes=self._headroom_bytes,
            limit_bytes=max(1, limit_bytes),
            limit=limit,
            mapped_bytes=max(0, stat.mapped_bytes - own_mapped_bytes - stat.stuck_bytes),
            refault_bytes_per_s=self._refaults.per_s * PAGE_BYTES,
            bites=self._biting.add(self._clock(), self._times_met()),
            grain_bytes=self._grain_bytes,
        )

    def has_limit(self) -> bool:
        """Whether one is set now."""
        return self._limit()[0] < _NO_LIMIT_V1_BYTES

    def steady(self, slack_bytes: int) -> bool:
        """Whether there is at most so much less room than at the last `read`."""
        limit_bytes, _ = self._limit()
        usage_bytes = self._usage.number()
        if usage_bytes is None:
            return False
        least_bytes = self._headroom_bytes - slack_bytes
        # Where it holds without a page that could be dropped, nobody has to be asked for those.
        return limit_bytes - usage_bytes >= least_bytes or (
            limit_bytes - max(0, usage_bytes - self._read_stat().droppable_bytes) >= least_bytes
        )

    def _limit(self) -> tuple[int, str]:
        limits = [
            (n_bytes, file.path.name) for file in self._limits if (n_bytes := file.number()) is not None
        ]
        return min(limits, default=(_NO_LIMIT_V1_BYTES, ""))

    def _times_met(self) -> int | None:
        """How often this very limit was met; those of the cgroups below are not in `memory.events.local`."""
        data = None if self._events is None else self._events.read()
        return sum(int(number) for number in _MET.findall(data)) if data else None

    def _read_stat(self) -> Stat:
        """What nobody misses, and what somebody did: looked up as often as `_STAT_SHARE` allows."""
        before_s = self._clock()
        if before_s >= self._stat_again_s:
            self._stat = self._stat_lines.read(self._stat_file.read() or b"")
            self._refaults.add(before_s, self._stat.refaults)
            after_s = self._clock()
            self._stat_again_s = after_s + rest_s(after_s - before_s, _STAT_SHARE)
        return self._stat

    def close(self) -> None:
        for file in (*self._limits, self._usage, self._stat_file):
            file.close()
        if self._events is not None:
            self._events.close()


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
