"""Looks at a sandbox and at the model's process from outside, every few milliseconds or ten times a second.

The kernel brings `total=` up to date on every read, and the averages every 2 s (Documentation/accounting/
psi.rst): both are noted from the same read, so that what polling the average would have seen can be said from
the same series.
"""

from __future__ import annotations

import bisect
import contextlib
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from psi_kv_governor.pressure.headroom import HeadroomReader
from psi_kv_governor.pressure.kernel_file import KernelFile
from psi_kv_governor.sandbox.process_memory import Sample, glance
from psi_kv_governor.sandbox.sandbox import Sandbox

MACHINE_PRESSURE = Path("/proc/pressure/memory")

_PSI = re.compile(rb"some avg10=(\d+\.\d\d) [^\n]*total=(\d+)\nfull [^\n]*total=(\d+)\n")
_NOWHERE = Path("/nonexistent")
_GONE = Sample(resident_bytes=0, anonymous_bytes=0, swap_bytes=0, peak_bytes=0)


class Pressure(NamedTuple):
    """What a pressure file says."""

    some_us: int
    """Stall since the cgroup was made, or the machine booted; as is `full_us`."""
    full_us: int
    avg10: float
    """The kernel's running average of `some`, 0 to 1."""


class Look(NamedTuple):
    """One moment. NamedTuple: a look is taken every few ms, and thousands are kept."""

    time_s: float
    """Monotonic."""
    inside: Pressure | None
    """Of the sandbox; None without one, or where its kernel or layout keeps none."""
    outside: Pressure | None
    """Of the whole machine, which the sandbox is a part of."""
    headroom_bytes: int
    """0 without a sandbox."""
    memory: Sample
    """Of the model's process; zeros once it is gone."""


class Watcher:
    """A thread that takes looks from when it is entered until it is left."""

    def __init__(self, sandbox: Sandbox | None, pid: int, interval_s: float) -> None:
        self._interval_s, self._pid = interval_s, pid
        self._inside = None if sandbox is None else sandbox.pressure_file
        self._headroom = None if sandbox is None else HeadroomReader(sandbox.own_cgroups(), root=_NOWHERE)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="psi-kv-watch", daemon=True)
        self._cpu_s = 0.0
        self.looks: list[Look] = []

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def busy_share(self, seconds: float) -> float:
        """Of one core, that looking has taken in the `seconds` since it began."""
        return self._cpu_s / seconds

    def _run(self) -> None:
        with contextlib.ExitStack() as files:
            inside, outside = (
                None if path is None else files.enter_context(contextlib.closing(KernelFile(path)))
                for path in (self._inside, MACHINE_PRESSURE)
            )
            if self._headroom is not None:
                files.enter_context(contextlib.closing(self._headroom))
            began_s = time.thread_time()
            while True:
                self.looks.append(self._look(inside, outside))
                self._cpu_s = time.thread_time() - began_s
                if self._stop.wait(self._interval_s):
                    return

    def _look(self, inside: KernelFile | None, outside: KernelFile | None) -> Look:
        found = None if self._headroom is None else self._headroom.read()
        return Look(
            time_s=time.monotonic(),
            inside=_pressure(inside),
            outside=_pressure(outside),
            headroom_bytes=0 if found is None else found.headroom_bytes,
            memory=glance(self._pid) or _GONE,
        )


def _pressure(file: KernelFile | None) -> Pressure | None:
    """None where there is no such file (a kernel without PSI), or no longer."""
    found = None if file is None else _PSI.match(file.read() or b"")
    return None if found is None else Pressure(int(found[2]), int(found[3]), float(found[1]) / 100.0)


# -- what a series says ------------------------------------------------------------------------------------


class Shares(NamedTuple):
    """Shares of time (0 to 1) lost to stalls."""

    some: float
    full: float


def shares(before: Pressure | None, after: Pressure | None, seconds: float) -> Shares | None:
    """What was lost between two looks that are `seconds` apart."""
    if before is None or after is None or seconds <= 0:
        return None
    return Shares(
        *(
            min(1.0, max(0, late - early) / 1e6 / seconds)
            for early, late in zip(before[:2], after[:2], strict=True)
        )
    )


def between(looks: Sequence[Look], begin_s: float, end_s: float, *, inside: bool) -> Shares | None:
    """What was lost from `begin_s` to `end_s`; None where nobody says."""
    series = [(look.time_s, look.inside if inside else look.outside) for look in looks]
    known = [(time_s, found) for time_s, found in series if found is not None]
    if not known or end_s <= begin_s:
        return None
    lost = []
    for field in (0, 1):
        points = [(time_s, found[field]) for time_s, found in known]
        stall_us = amount_at(points, end_s) - amount_at(points, begin_s)
        lost.append(min(1.0, max(0.0, stall_us / 1e6 / (end_s - begin_s))))
    return Shares(*lost)


def amount_at(points: Sequence[tuple[float, float]], time_s: float) -> float:
    """What was done by `time_s`: between two reports in proportion, before the first and after the last
    what they say. `points` are (time, amount) in order, at least one."""
    after = bisect.bisect_right(points, (time_s, float("inf")))
    if after == 0:
        return points[0][1]
    if after == len(points):
        return points[-1][1]
    (early_s, early), (late_s, late) = points[after - 1], points[after]
    return early + (late - early) * (time_s - early_s) / (late_s - early_s)
