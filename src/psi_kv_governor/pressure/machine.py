"""The pressure source of a running machine: stall and headroom in one reading."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from psi_kv_governor.errors import BadInputError, SourceLostError
from psi_kv_governor.pressure.cgroup import Membership
from psi_kv_governor.pressure.headroom import Room
from psi_kv_governor.pressure.processes import Processes, ProcessSizes, only_this
from psi_kv_governor.pressure.psi import PsiFile, PsiTotals, Stall, StallMeter
from psi_kv_governor.pressure.reading import Bounds, Level, Reading

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


class _Gauge:
    """The PSI file of one more level: what it tells where it can be read, and nothing where it can't."""

    def __init__(self, path: Path) -> None:
        self._meter = StallMeter()
        try:
            self._file: PsiFile | None = PsiFile(path)
        except (OSError, BadInputError):
            self._file = None

    def read(self, time_s: float) -> Stall:
        if self._file is None:
            return _NO_STALL
        try:
            return self._meter.add(time_s, self._file.read())
        except SourceLostError:
            self.close()
            return _NO_STALL

    def still(self, time_s: float) -> bool:
        return self._file is None or self._meter.still(time_s, self._file.read())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class MachineSource:
    """Reads counters of stall, and the headroom of every level. Not thread safe: the governor has one thread
    for it.

    Without counters (`counters` is None) the stall is not known in any reading and only the headroom speaks.
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
        *,
        level: str = "",
        others: Mapping[str, Path] | None = None,
        processes: Processes = only_this,
    ) -> None:
        """`level` is the name of the level that `counters` are of; without it they are a cgroup's that has no
        limit. `others` are the PSI files of further levels, which count where those have a limit. `processes`
        gives the ids of those that hold the caches: this one, or the programs that it governs."""
        self._counters = counters
        self._headroom = headroom
        self._name = name
        self._clock = clock
        self._membership = membership
        self._level = level or name
        self._others = dict(others or {})
        self._gauges: dict[str, _Gauge] = {}
        self._processes = processes
        self._sizes = ProcessSizes()
        self._meter = StallMeter()
        self._look_s = 0.0
        self._last_s: float | None = None

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
        resident_bytes, mapped_bytes = self._own_bytes()
        levels = [
            self._with_stall(level, time_s, stall) for level in self._headroom.levels(mapped_bytes or 0)
        ]
        if self._counters is not None and all(level.name != self._level for level in levels):
            levels.append(_stalled(Level(name=self._level), stall))
        return Reading(
            time_s=time_s,
            interval_s=stall.interval_s if self._counters is not None else self._since_last_s(time_s),
            levels=tuple(levels),
            own_resident_bytes=resident_bytes,
            source=self._name,
        )

    def glance(self, bounds: Bounds) -> float | None:
        """Its time, where nothing is to be seen that the last reading did not tell; None where one is due.

        Counters of stall are compared, and the headroom of those levels that could have lost enough by now:
        0.1 ms where a reading takes 0.6 and what follows from it 1.2, medians of a busy machine.
        """
        time_s = self._clock()
        if time_s >= bounds.until_s:
            return None
        try:
            if self._counters is not None and not self._meter.still(time_s, self._counters.read()):
                return None
            if not all(gauge.still(time_s) for gauge in self._gauges.values()):
                return None
        except SourceLostError:  # the reading that follows says so
            return None
        if self._membership is not None and time_s >= self._look_s:
            if self._membership.changed():
                return None
            self._look_s = time_s + _MOVED_EVERY_S
        due = {name: bound.slack_bytes for name, bound in bounds.levels.items() if time_s >= bound.until_s}
        return time_s if self._headroom.steady(due) else None

    def _since_last_s(self, time_s: float) -> float:
        """What a reading covers where no stall is told."""
        before_s, self._last_s = self._last_s, time_s
        return 0.0 if before_s is None else max(0.0, time_s - before_s)

    def _with_stall(self, level: Level, time_s: float, stall: Stall) -> Level:
        """A gauge is opened when its level first has a limit."""
        if level.name == self._level:
            return level if self._counters is None else _stalled(level, stall)
        if level.name not in self._others:
            return level
        if level.name not in self._gauges:
            self._gauges[level.name] = _Gauge(self._others[level.name])
        return _stalled(level, self._gauges[level.name].read(time_s))

    def _own_bytes(self) -> tuple[int | None, int | None]:
        """Resident memory of the governed processes, and what of it is file pages and shared memory."""
        sizes = [size for pid in self._processes() if (size := self._sizes.read(pid)) is not None]
        if not sizes:
            return None, None
        return sum(resident for resident, _ in sizes), sum(mapped for _, mapped in sizes)

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
        for gauge in self._gauges.values():
            gauge.close()
        self._headroom.close()
        self._sizes.close()
        if self._membership is not None:
            self._membership.close()


def _stalled(level: Level, stall: Stall) -> Level:
    """`level` with its stall, where the counters cover some time."""
    if stall.interval_s <= 0.0:
        return level
    return msgspec.structs.replace(level, some=stall.some, full=stall.full)
