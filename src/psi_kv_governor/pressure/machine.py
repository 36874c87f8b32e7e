"""The pressure source of a running machine: stall and headroom in one reading."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from psi_kv_governor.errors import SourceLostError
from psi_kv_governor.pressure.cgroup import Membership
from psi_kv_governor.pressure.headroom import Room
from psi_kv_governor.pressure.kernel_file import KernelFile
from psi_kv_governor.pressure.psi import PsiTotals, Stall, StallMeter
from psi_kv_governor.pressure.reading import Reading

_NO_STALL = Stall(0.0, 0.0, 0.0)

_MOVED_EVERY_S = 1.0
"""How often to look whether the process is still in its cgroup: 2 us, and nobody moves a model often."""


class MovedError(SourceLostError):
    """The process is in another cgroup now: nothing failed, but there is something better to read."""


class Counters(Protocol):
    """Tells how much stall there has been: a PSI file, or an estimate of one."""

    def read(self) -> PsiTotals:
        """The counters now. Raises SourceLostError when they are gone."""

    def close(self) -> None:
        """Give back the descriptor. Safe to call twice."""


class MachineSource:
    """Reads counters of stall and the headroom. Not thread safe: the governor has one thread for it.

    Without counters (`counters` is None) the stall is 0 in every reading and only the headroom speaks.
    A whole reading in a cgroup with a limit takes 16 us one after the other; 69 us at 50 Hz and 147 us at
    10 Hz (medians on a busy machine), when hardly anything of it is in the processor's caches any more.
    """

    def __init__(
        self,
        counters: Counters | None,
        headroom: Room,
        name: str,
        clock: Callable[[], float] = time.monotonic,
        membership: Membership | None = None,
    ) -> None:
        self._counters = counters
        self._headroom = headroom
        self._name = name
        self._clock = clock
        self._membership = membership
        self._own = KernelFile(Path("/proc/self/statm"))
        self._meter = StallMeter()
        self._look_s = 0.0

    @property
    def name(self) -> str:
        """What is read, in words a user can follow up."""
        return self._name

    def read(self) -> Reading:
        """Take a reading now.

        Raises SourceLostError when the counters are gone, and MovedError when this process was moved to
        another cgroup. A limit that is gone is no failure: the headroom is then the next ancestor's, or the
        machine's.
        """
        totals = None if self._counters is None else self._counters.read()
        time_s = self._clock()
        stall = _NO_STALL if totals is None else self._meter.add(time_s, totals)
        self._check_place(time_s)
        room = self._headroom.read()
        return Reading(
            time_s=time_s,
            interval_s=stall.interval_s,
            some=stall.some,
            full=stall.full,
            headroom_bytes=None if room is None else room.headroom_bytes,
            limit_bytes=None if room is None else room.limit_bytes,
            own_resident_bytes=self._own_resident_bytes(),
            source=self._name,
        )

    def _own_resident_bytes(self) -> int | None:
        """The second number of statm, in pages: proc(5)."""
        words = (self._own.read() or b"").split()
        return int(words[1]) * mmap.PAGESIZE if len(words) > 1 and words[1].isdigit() else None

    def _check_place(self, time_s: float) -> None:
        if self._membership is None or time_s < self._look_s:
            return
        self._look_s = time_s + _MOVED_EVERY_S
        if self._membership.changed():
            raise MovedError("this process was moved to another cgroup")

    def close(self) -> None:
        """Give back the descriptors. Safe to call twice."""
        if self._counters is not None:
            self._counters.close()
        self._headroom.close()
        self._own.close()
        if self._membership is not None:
            self._membership.close()
