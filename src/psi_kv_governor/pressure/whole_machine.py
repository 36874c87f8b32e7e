"""The machine as a level: what /proc/meminfo says is available, and whether the kernel reclaims.

Kernel: Documentation/filesystems/proc.rst.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from psi_kv_governor.pressure.counting import Biting, Rate, rest_s
from psi_kv_governor.pressure.kernel_file import PAGE_BYTES, KernelFile
from psi_kv_governor.pressure.reading import MACHINE, Level

_VMSTAT_SHARE = 0.01
"""Most of the time that may go into reading /proc/vmstat: its counters are added up over all processors."""

_MEMINFO = re.compile(
    rb"^(MemTotal|MemFree|MemAvailable|Mapped|Shmem|Dirty|Writeback|Unevictable|Inactive\(file\)"
    rb"|SwapTotal|SwapFree):\s+(\d{1,20}) kB\n",
    re.MULTILINE,
)
_VMSTAT = re.compile(rb"^(pgscan_kswapd|pgscan_direct|workingset_refault_file) (\d{1,20})\n", re.MULTILINE)


class Memory(NamedTuple):
    """What /proc/meminfo says, in bytes."""

    total_bytes: int
    available_bytes: int
    mapped_bytes: int
    """File pages that somebody has mapped."""
    stuck_bytes: int
    """Of file pages, what can't be dropped at once: dirty, being written, locked."""
    reusable_bytes: int
    """Free pages and inactive file pages."""
    swap_total_bytes: int
    swap_free_bytes: int

    @property
    def headroom_bytes(self) -> int:
        """MemAvailable less the file pages that somebody has mapped.

        MemAvailable counts all but a few file pages as free. Those of a model that is mapped are its weights:
        to take them makes every token read them again.
        """
        return max(0, self.available_bytes - self.mapped_bytes)


def parse_meminfo(text: bytes) -> Memory | None:
    """None where the text does not tell what is available of how much."""
    values = {name: int(number) * 1024 for name, number in _MEMINFO.findall(text)}
    if b"MemAvailable" not in values or b"MemTotal" not in values:
        return None

    def of(name: bytes) -> int:
        return values.get(name, 0)

    return Memory(
        total_bytes=of(b"MemTotal"),
        available_bytes=of(b"MemAvailable"),
        mapped_bytes=max(0, of(b"Mapped") - of(b"Shmem")),
        stuck_bytes=of(b"Dirty") + of(b"Writeback") + of(b"Unevictable"),
        reusable_bytes=of(b"MemFree") + of(b"Inactive(file)"),
        swap_total_bytes=of(b"SwapTotal"),
        swap_free_bytes=of(b"SwapFree"),
    )


class WholeMachine:
    """Reads the machine's level; files stay open until `close`, and are opened again after it."""

    def __init__(self, root: Path, clock: Callable[[], float]) -> None:
        self._meminfo = KernelFile(root / "proc/meminfo")
        self._vmstat = KernelFile(root / "proc/vmstat")
        self._clock = clock
        self._vmstat_again_s = 0.0
        self._biting, self._refaults = Biting(), Rate()
        self._bites: bool | None = None
        self.memory: Memory | None = None
        """As of the last `read`."""

    @property
    def source(self) -> str:
        """The file that sets the limit."""
        return str(self._meminfo.path)

    def read(self, own_mapped_bytes: int = 0) -> Level | None:
        """The level now, without its stall; None where /proc/meminfo does not tell."""
        self.memory = memory = parse_meminfo(self._meminfo.read() or b"")
        if memory is None:
            return None
        self._count()
        return Level(
            name=MACHINE,
            headroom_bytes=memory.headroom_bytes,
            limit_bytes=memory.total_bytes,
            limit="MemAvailable",
            mapped_bytes=min(
                max(0, memory.mapped_bytes - own_mapped_bytes - memory.stuck_bytes), memory.available_bytes
            ),
            refault_bytes_per_s=self._refaults.per_s * PAGE_BYTES,
            bites=self._bites,
            swap_bytes=memory.swap_free_bytes,
        )

    def steady(self, slack_bytes: int) -> bool:
        """Whether there is at most so much less headroom than at the last `read`."""
        now = parse_meminfo(self._meminfo.read() or b"")
        return (
            now is not None
            and self.memory is not None
            and now.headroom_bytes >= self.memory.headroom_bytes - slack_bytes
        )

    def _count(self) -> None:
        """pgscan_* count what the kernel looked at for the machine's sake alone: reclaim of a cgroup at its
        own limit is not in them (mm/vmscan.c; Linux 6.18 in a thrashing cgroup: 0)."""
        before_s = self._clock()
        if before_s < self._vmstat_again_s:
            return
        values = {name: int(number) for name, number in _VMSTAT.findall(self._vmstat.read() or b"")}
        scanned = [values[name] for name in (b"pgscan_kswapd", b"pgscan_direct") if name in values]
        self._bites = self._biting.add(before_s, sum(scanned) if scanned else None)
        self._refaults.add(before_s, values.get(b"workingset_refault_file", 0))
        after_s = self._clock()
        self._vmstat_again_s = after_s + rest_s(after_s - before_s, _VMSTAT_SHARE)

    def close(self) -> None:
        """Give the descriptors back. Safe to call twice."""
        self._meminfo.close()
        self._vmstat.close()
