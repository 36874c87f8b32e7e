"""Looks at a pen from outside every few milliseconds, and what such a series of looks tells.

The kernel brings `total=` up to date on every read, and the averages every 2 s (Documentation/accounting/
psi.rst): both are noted from the same read, so that what polling the average would have seen can be told
from the same series.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from psi_kv_governor.bench.cgroups import Group
from psi_kv_governor.pressure.cgroup import Cgroup, OwnCgroups
from psi_kv_governor.pressure.headroom import HeadroomReader

_READ_BYTES = 512
_PSI = re.compile(rb"some avg10=(\d+\.\d\d) [^\n]*total=(\d+)\nfull [^\n]*total=(\d+)\n")
_NO_PSI = (0.0, 0, 0)
_NOWHERE = Path("/nonexistent")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

FELL_BYTES = 1 << 20
"""Anonymous memory has fallen when it is this much below its highest. The kernel counts a process's pages
in batches of some ten kB a core, so that less than this is not told apart from its noise."""


class Look(NamedTuple):
    """The pen at one moment. NamedTuple: a look is taken every few ms, and thousands are kept."""

    time_s: float
    """Monotonic."""
    some_us: int
    """Stall since the pen was made, as is `full_us`."""
    full_us: int
    avg10: float
    """The kernel's running average of `some`, 0 to 1."""
    headroom_bytes: int
    anonymous_bytes: int
    """Of the model's process; 0 once it is gone."""


class Watch:
    """A thread that takes looks from when it is entered until it is left."""

    def __init__(self, group: Group, pid: int, interval_s: float) -> None:
        self._interval_s = interval_s
        self._pressure = None if group.unified is None else group.unified / "memory.pressure"
        self._headroom = HeadroomReader(_only(group), root=_NOWHERE)
        self._statm = Path(f"/proc/{pid}/statm")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="psi-kv-watch", daemon=True)
        self.looks: list[Look] = []
        self._busy_s = 0.0

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def busy_share(self, seconds: float) -> float:
        """Of one core, that looking has taken in the `seconds` since it began."""
        return self._busy_s / seconds

    def _run(self) -> None:
        descriptor = -1
        with contextlib.suppress(OSError):  # a kernel without PSI: only the headroom is seen
            if self._pressure is not None:
                descriptor = os.open(self._pressure, os.O_RDONLY | os.O_CLOEXEC)
        began_s = time.thread_time()
        try:
            while not self._stop.wait(self._interval_s):
                self.looks.append(self._look(descriptor))
                self._busy_s = time.thread_time() - began_s
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _look(self, descriptor: int) -> Look:
        avg10, some_us, full_us = _psi(descriptor)
        room = self._headroom.read()
        return Look(
            time_s=time.monotonic(),
            some_us=some_us,
            full_us=full_us,
            avg10=avg10,
            headroom_bytes=0 if room is None else room.headroom_bytes,
            anonymous_bytes=_anonymous_bytes(self._statm),
        )


def _only(group: Group) -> OwnCgroups:
    """The group as if it had no ancestors: what is around the pen has no part in what is measured."""
    own = Cgroup(group.place.version, group.memory, group.memory)
    return OwnCgroups(own, None) if group.place.version == 2 else OwnCgroups(None, own)


def _psi(descriptor: int) -> tuple[float, int, int]:
    if descriptor < 0:
        return _NO_PSI
    try:
        found = _PSI.match(os.pread(descriptor, _READ_BYTES, 0))
    except OSError:  # the pen is gone
        return _NO_PSI
    return _NO_PSI if found is None else (float(found[1]) / 100.0, int(found[2]), int(found[3]))


def _anonymous_bytes(statm: Path) -> int:
    """Resident minus shared pages (proc_pid_statm(5)): 10 us, where smaps_rollup walks the page tables."""
    try:
        _, resident, shared, *_ = statm.read_text().split()
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * _PAGE_BYTES


# -- what a series tells -----------------------------------------------------------------------------------


class Signal(NamedTuple):
    """The first sign of need."""

    time_s: float
    what: str
    """`stall` or `headroom`."""


def first_signal(looks: Iterable[Look], since_s: float, stall_us: int, line_bytes: float) -> Signal | None:
    """When `some` had grown by `stall_us` since `since_s`, or the headroom was under the line: the first.

    The stall is counted from the last look before `since_s`. None where neither happened.
    """
    before: int | None = None
    for look in looks:
        if look.time_s < since_s or before is None:
            before = look.some_us
            if look.time_s < since_s:
                continue
        if look.headroom_bytes < line_bytes:
            return Signal(look.time_s, "headroom")
        if look.some_us - before >= stall_us:
            return Signal(look.time_s, "stall")
    return None


def poll_time(looks: Sequence[Look], since_s: float, threshold: float, poll_s: float) -> float | None:
    """When somebody who reads avg10 every `poll_s` would first have seen it at `threshold` (0 to 1) or above.

    The polls stand on whole multiples of `poll_s` of the clock, at no known distance from the onset, as a
    poller's would. None where no poll before the end of the series saw it.
    """
    due_s = (since_s // poll_s + 1) * poll_s
    previous: Look | None = None
    for look in looks:
        while look.time_s > due_s:
            if previous is not None and previous.avg10 >= threshold:
                return due_s
            due_s += poll_s
        previous = look
    return None


def first_fall(looks: Iterable[Look], since_s: float) -> float | None:
    """When the process's anonymous memory first was FELL_BYTES below its highest since `since_s`."""
    highest = 0
    for look in looks:
        if look.time_s < since_s or not look.anonymous_bytes:
            continue
        highest = max(highest, look.anonymous_bytes)
        if look.anonymous_bytes <= highest - FELL_BYTES:
            return look.time_s
    return None
