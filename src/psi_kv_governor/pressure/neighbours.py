"""What the governors of one user say to each other: a small file each, in the folder of the status sockets.

A file is `<pid>-<n>.room`, locked (flock(2)) by its writer for as long as that lives; the next who looks
removes those whose writer is gone. Nothing in it is believed for longer than it can be true, and who can't
write one is only not known to the others.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from psi_kv_governor.forks import at_fork
from psi_kv_governor.pressure.notice import Notice, packed, read_notice
from psi_kv_governor.pressure.processes import Processes, ProcessSizes, only_this
from psi_kv_governor.pressure.reading import MACHINE, Level, Neighbour, Standing
from psi_kv_governor.socket_place import folders, private

if sys.platform != "win32":
    import fcntl

_NAME = re.compile(r"\d{1,10}-\d{1,6}\.room")
_numbers = itertools.count(1)

_LOOK_EVERY_S = 1.0
"""How often the folder is read: 20 us, and a governor is not started more often than that."""

_STALE_S = 3.0
"""A restore says so at each slice; one that has not for so long is stuck, and keeps nobody waiting."""

_SPANS = 8
"""Stall is looked at over a second at the most: so many parkings of 0.1 s are in it."""


class _Heard(NamedTuple):
    """An open file of somebody else's."""

    descriptor: int
    notice: Notice


class Neighbourhood(Protocol):
    """Where governors hear of each other."""

    def say(self, levels: Sequence[Level], standing: Standing) -> None:
        """How this governor stands."""

    def say_work(self, spans: Sequence[tuple[float, float]]) -> None:
        """When this governor was parking or restoring; a span that goes on ends at infinity."""

    def read(self, levels: Sequence[Level]) -> tuple[Neighbour, ...]:
        """The other governors, by what they said last."""

    def close(self) -> None:
        """Say no more. Safe to call twice."""


class Neighbours:
    """This governor's file, and the others'. Any thread may say something; one listens.

    Never raises: a folder that can't be had is `problem`, and nobody is known then.
    """

    def __init__(
        self,
        folder: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        processes: Processes = only_this,
    ) -> None:
        """`processes` gives the ids of those that hold the caches."""
        self.problem = ""
        self._clock = clock
        self._processes = processes
        self._sizes = ProcessSizes()
        self._descriptor = -1
        self._path: Path | None = None
        self._heard: dict[str, _Heard] = {}
        self._look_again_s = -math.inf
        self._notice = Notice((), _pid_space(), (), 0.0, 0.0, 0, 0, False, 0, 0, ())
        self._ids: dict[str, str] = {}
        try:
            self._folder = _folder() if folder is None else folder
            self._open()
        except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
            why = getattr(error, "strerror", None) or error
            self.problem = f"other governors can't be told of this one: {why}"
        _open_ones.add(self)
        self._end = weakref.finalize(self, _drop, self._descriptor, self._path)
        weakref.finalize(self, _leave, self._heard)  # also when it is only dropped

    # -- saying -----------------------------------------------------------------------------------------

    def say(self, levels: Sequence[Level], standing: Standing) -> None:
        """How this governor stands. Written only where it differs, or while it restores: 5 us."""
        said = msgspec.structs.replace(
            self._notice,
            pids=tuple(self._processes()),
            levels=tuple(name for level in levels if (name := self._id(level.name))),
            **msgspec.structs.asdict(standing),
        )
        if standing.restoring or msgspec.structs.replace(said, resident_bytes=0) != msgspec.structs.replace(
            self._notice, resident_bytes=0
        ):
            self._write(said)

    def say_work(self, spans: Sequence[tuple[float, float]]) -> None:
        """When this governor was parking or restoring; a span that goes on ends at infinity."""
        self._write(msgspec.structs.replace(self._notice, work=tuple(spans[-_SPANS:])))

    def _write(self, notice: Notice) -> None:
        self._notice = msgspec.structs.replace(notice, time_s=self._clock())
        if self._descriptor < 0:
            return
        with contextlib.suppress(OSError):  # a full disk: the others go by what was said before
            os.pwrite(self._descriptor, packed(self._notice), 0)

    # -- listening --------------------------------------------------------------------------------------

    def read(self, levels: Sequence[Level]) -> tuple[Neighbour, ...]:
        """The other governors, by what they said last. `levels` are those of the reading they are for."""
        if self._descriptor < 0:
            return ()
        now_s = self._clock()
        if now_s >= self._look_again_s:
            self._look_again_s = now_s + _LOOK_EVERY_S
            with contextlib.suppress(OSError):
                self._look()
        names = {self._id(level.name): level.name for level in levels}
        found = []
        for name, heard in list(self._heard.items()):
            notice = read_notice(heard.descriptor) or heard.notice
            self._heard[name] = _Heard(heard.descriptor, notice)
            found.append(self._neighbour(name, notice, names, now_s))
        return tuple(found)

    def _neighbour(self, name: str, notice: Notice, names: dict[str, str], now_s: float) -> Neighbour:
        active = notice.restoring and 0.0 <= now_s - notice.time_s < _STALE_S
        resident_bytes = notice.resident_bytes
        if notice.pid_space == self._notice.pid_space:  # else its numbers are others' here
            sizes = [size[0] for pid in notice.pids if (size := self._sizes.read(pid)) is not None]
            resident_bytes = sum(sizes) if sizes else resident_bytes
        return Neighbour(
            id=name,
            levels=tuple(names[one] for one in notice.levels if one in names),
            last_used_s=notice.last_used_s,
            trimmable_bytes=notice.trimmable_bytes,
            masked_bytes=notice.masked_bytes,
            restoring=active,
            claim_bytes=notice.claim_bytes if active else 0,
            resident_bytes=resident_bytes,
            work=tuple((begin_s, min(end_s, now_s)) for begin_s, end_s in notice.work),
        )

    def _look(self) -> None:
        """Open what is new, and remove what nobody holds any more."""
        own = None if self._path is None else self._path.name
        there = {entry.name for entry in self._folder.iterdir() if _NAME.fullmatch(entry.name)} - {own}
        for name in set(self._heard) - there:
            os.close(self._heard.pop(name).descriptor)
        for name in there:
            path = self._folder / name
            if name not in self._heard:
                with contextlib.suppress(OSError):
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                    if (notice := read_notice(descriptor)) is None:
                        os.close(descriptor)
                    else:
                        self._heard[name] = _Heard(descriptor, notice)
            elif _abandoned(self._heard[name].descriptor):
                os.close(self._heard.pop(name).descriptor)
                with contextlib.suppress(OSError):
                    path.unlink()

    def _id(self, level: str) -> str:
        """A name for a level that is the same in every container: the cgroup's number, not its path."""
        if level not in self._ids:
            self._ids[level] = MACHINE if level == MACHINE else ""
            with contextlib.suppress(OSError, ValueError):  # the line of another program is no folder
                if level.startswith("/"):
                    found = Path(level).stat()
                    self._ids[level] = f"{found.st_dev}:{found.st_ino}"
        return self._ids[level]

    # -- beginning and end ------------------------------------------------------------------------------

    def _open(self) -> None:
        if sys.platform == "win32":
            raise OSError("there are no file locks of this kind here")
        path = self._folder / f"{os.getpid()}-{next(_numbers)}.room"
        early = path.with_name(f"{path.name}.new")
        self._descriptor = os.open(early, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._write(self._notice)
            early.rename(path)  # whoever sees this name finds it locked
        except OSError:
            os.close(self._descriptor)
            self._descriptor = -1
            early.unlink(missing_ok=True)
            raise
        self._path = path

    def close(self) -> None:
        """Leave the others. Safe to call twice."""
        _leave(self._heard)
        self._sizes.close()
        self._descriptor, self._path = -1, None
        self._end()

    def abandon(self) -> None:
        """In a forked child: the lock is the parent's, and would outlive it here."""
        if self._end.detach() is not None:
            _drop(self._descriptor, None)
        self._descriptor, self._path = -1, None


def _leave(heard: dict[str, _Heard]) -> None:
    while heard:
        os.close(heard.popitem()[1].descriptor)


def _drop(descriptor: int, path: Path | None) -> None:
    if path is not None:
        with contextlib.suppress(OSError):
            path.unlink()
    if descriptor >= 0:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _folder() -> Path:
    """The first folder for sockets that can be had. Raises OSError."""
    why = OSError("no folder for it can be had")
    for folder in folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            why = error
            continue
        if private(folder):
            return folder
    raise why


def _abandoned(descriptor: int) -> bool:
    """Whether the writer is gone: its lock can be had."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _pid_space() -> str:
    """Which namespace of process ids this is; '' where that is not told."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


_open_ones: weakref.WeakSet[Neighbours] = weakref.WeakSet()


def _after_fork() -> None:
    for neighbours in list(_open_ones):
        neighbours.abandon()


at_fork(in_child=_after_fork)
