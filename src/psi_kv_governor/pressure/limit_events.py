"""How often a cgroup met its limit, as an estimate of stall where the kernel keeps no PSI.

Kernel: Documentation/admin-guide/cgroup-v2.rst (memory.events). v1 has nothing like it that can be trusted:
on Linux 6.18 its memory.failcnt stays 0 while the cgroup thrashes at its limit.
"""

from __future__ import annotations

import re
from pathlib import Path

from psi_kv_governor.errors import BadInputError, SourceLostError
from psi_kv_governor.pressure.cgroup import OwnCgroups
from psi_kv_governor.pressure.kernel_file import KernelFile
from psi_kv_governor.pressure.psi import PsiTotals

_EVENT_STALL_US = 100
"""Stall that goes with one meeting of the limit, which frees 64 pages or more. 400 MiB of a file read through
a full cgroup cost 46 ms of stall, 29 us for 64 pages that were clean; pages that are written out, or read
again soon, cost some times that."""

_OOM_STALL_US = 1_000_000
"""An OOM (a kill, or an allocation refused): whoever met it stood still, so the second counts as lost."""

_LINE = re.compile(rb"(\w{1,40}) (\d{1,20})\n")


class LimitEvents:
    """Counts how often the limit was met, in microseconds of stall that it may have cost.

    `path` is memory.events: `high` and `max`, and `oom` and `oom_kill` as full stall. Raises OSError on
    creation where it can't be read, BadInputError where it is of another shape.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = KernelFile(path)
        with path.open("rb"):  # for the errno
            pass
        try:
            self.read()
        except SourceLostError as error:
            self.close()
            raise BadInputError(str(error)) from error

    def read(self) -> PsiTotals:
        """The estimate now, in the shape of PSI's totals. Raises SourceLostError when the cgroup is gone."""
        data = self._file.read()
        if data is None:
            raise SourceLostError(f"{self.path} no longer answers: the cgroup is gone")
        try:
            return parse_events(data)
        except BadInputError as error:
            raise SourceLostError(f"{self.path}: {error}") from error

    def close(self) -> None:
        """Give the descriptor back. Safe to call twice."""
        self._file.close()


def parse_events(data: bytes) -> PsiTotals:
    """Read memory.events. Raises BadInputError on anything else."""
    lines = _LINE.findall(data)
    if b"".join(b"%b %b\n" % line for line in lines) != data or not lines:
        raise BadInputError("not a list of memory events")
    counts = {name: int(count) for name, count in lines}
    met = counts.get(b"high", 0) + counts.get(b"max", 0)
    oom = counts.get(b"oom", 0) + counts.get(b"oom_kill", 0)
    return PsiTotals(met * _EVENT_STALL_US + oom * _OOM_STALL_US, oom * _OOM_STALL_US)


def events_of(cgroups: OwnCgroups) -> Path | None:
    """memory.events of the nearest cgroup that has it; None where none has."""
    if cgroups.unified is not None and not cgroups.unified.is_root:
        for folder in cgroups.unified.lineage:
            if (folder / "memory.events").exists():
                return folder / "memory.events"
    return None
