"""Parks once what a program without an agent holds while it runs: by ptrace, where that is permitted.

Contents never change by it. It is stopped for each slice, which is written to a file and mapped in its place.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.llama.process import choose
from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.kernel import memory
from psi_kv_governor.kernel.memory import PAGE_BYTES
from psi_kv_governor.kernel.ptrace import CannotStopError, Stopped, machine, stopped
from psi_kv_governor.residence.files import open_unlinked
from psi_kv_governor.service.allocations import Allocation, allocations, resident, still_there

_SLICE_BYTES = 16 << 20
"""Written while the program stands still: 10 to 20 ms of a disk's cache."""
_PIECE_BYTES = 256 << 10
"""What is all zero is not written: a cache is, where no token was yet."""
_OPEN = os.O_RDWR | os.O_CLOEXEC
_SPARE_MAPPINGS = 64
_SET_DUMPABLE = 4  # PR_SET_DUMPABLE


class Parked(NamedTuple):
    """What was done."""

    n_bytes: int
    """Resident before, and in a file now."""
    allocations: int
    largest_bytes: int
    parts: int
    stopped_s: float
    """All stops together."""
    longest_s: float


def park_once(pid: int, config: GovernorConfig) -> str:
    """Park the large allocations of a process. Gives what was done, in a line. BadInputError: that
    can't be. PsiKvError: it failed on the way, and the program goes on with what it has."""
    chosen = choose(config)
    if not chosen.folder:
        raise BadInputError(f"process {pid} has no agent in it, and there is no place to park: {chosen.why}")
    if why := why_not(pid):
        raise BadInputError(f"process {pid} has no agent in it, and can't be parked from outside: {why}")
    try:
        done = _park(pid, chosen.folder, config)
    except OSError as error:
        raise PsiKvError(
            f"process {pid} runs on, not all of it is parked: {error.strerror or error}"
        ) from error
    except CannotStopError as error:
        raise PsiKvError(f"process {pid} runs on, not all of it is parked: {error}") from error
    if not done.n_bytes:
        return f"process {pid} holds no large allocation of glibc's malloc: nothing was parked"
    return (
        f"process {pid}: {done.n_bytes / 2**20:.0f} MiB of {done.allocations} allocations (the largest "
        f"{done.largest_bytes / 2**20:.0f}) were parked in {chosen.folder}, once; it stood still for "
        f"{done.stopped_s:.2f} s in {done.parts} parts, at most {done.longest_s:.3f} s"
    )


def why_not(pid: int) -> str:
    """Why the process can't be stopped and parked, and what to do; '' where nothing speaks against it."""
    try:
        machine()
        theirs, ours = _status(str(pid)), _status("self")
        return _busy(theirs, ours) or _elsewhere(pid)
    except CannotStopError as error:
        return str(error)
    except OSError as error:
        return f"{error.strerror}; {_permission()}"


def _status(pid: str) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def _busy(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    if (tracer := theirs.get("TracerPid", "0").strip()) != "0":
        return f"process {tracer} traces it already (a debugger?)"
    if theirs.get("State", "").startswith(("T", "t", "Z")):
        return "it is stopped, or has ended: continue it first"
    if int(theirs.get("Seccomp_filters", "0")) > int(ours.get("Seccomp_filters", "0")):
        return "its system calls are filtered (seccomp): run psi-kv where it runs, in its container"
    return ""


def _elsewhere(pid: int) -> str:
    """Raises OSError where it may not be looked into."""
    if Path(f"/proc/{pid}/ns/pid").readlink() != Path("/proc/self/ns/pid").readlink():
        return "it runs in a container of its own: run psi-kv in there"
    with Path(f"/proc/{pid}/mem").open("rb"):
        pass
    return "it is a 32-bit program" if _bits(str(pid)) != _bits("self") else ""


def _bits(pid: str) -> int:
    with Path(f"/proc/{pid}/exe").open("rb") as program:
        return program.read(5)[4]  # EI_CLASS


def _permission() -> str:
    with contextlib.suppress(OSError):
        scope = int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text())
        if scope >= 3:
            return "ptrace is off on this machine until it is booted again (yama)"
        if scope >= 1:
            return "only root, or its parent, may look into it here (yama): run it as root"
    return "only its user, or root with CAP_SYS_PTRACE, may look into it"


def _park(pid: int, folder: str, config: GovernorConfig) -> Parked:
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize - config.place_reserve_bytes
    left = min(free, config.place_limit_bytes)
    with _file_for(pid, folder) as (descriptor, path):
        work = _Work(pid, descriptor, path)
        for one in allocations(pid):
            if one.resident_bytes > left or _mappings_left(pid) < _SPARE_MAPPINGS:
                continue
            left -= one.resident_bytes
            work.park(one)
        with contextlib.suppress(OSError):  # clean pages go when they are wanted
            os.fdatasync(descriptor)
            memory.drop_file_pages(descriptor, 0, work.offset)
    return work.done


def _mappings_left(pid: int) -> int:
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    return most - Path(f"/proc/{pid}/maps").read_bytes().count(b"\n")


class _Work:
    def __init__(self, pid: int, descriptor: int, path: bytes) -> None:
        self.done = Parked(0, 0, 0, 0, 0.0, 0.0)
        self.offset = 0
        """Where in the file the next slice goes."""
        self._pid, self._descriptor, self._path = pid, descriptor, path
        self._buffer = bytearray(_PIECE_BYTES)

    def park(self, one: Allocation) -> None:
        """All of it but its first page. Raises OSError and CannotStopError; slices are whole or untouched."""
        moved = 0
        for start in range(one.start + PAGE_BYTES, one.stop, _SLICE_BYTES):
            stop = min(start + _SLICE_BYTES, one.stop)
            if not resident(self._pid, start, stop).any():
                continue
            with Path(f"/proc/{self._pid}/mem").open("r+b", buffering=0) as mem:
                begin_s = time.monotonic()
                with stopped(self._pid) as process:
                    n_bytes = self._move(process, mem.fileno(), start, stop, one)
                took_s = time.monotonic() - begin_s
            moved += n_bytes
            self.done = self.done._replace(
                n_bytes=self.done.n_bytes + n_bytes,
                parts=self.done.parts + 1,
                stopped_s=self.done.stopped_s + took_s,
                longest_s=max(self.done.longest_s, took_s),
            )
        if moved:
            largest = max(self.done.largest_bytes, moved)
            self.done = self.done._replace(allocations=self.done.allocations + 1, largest_bytes=largest)

    def _move(self, process: Stopped, mem: int, start: int, stop: int, whole: Allocation) -> int:
        """One slice, while nobody writes to it."""
        if not still_there(self._pid, mem, whole, start, stop):
            return 0  # freed since we looked
        n_bytes = self._write(mem, start, stop)
        before = os.pread(mem, len(self._path), process.spare)
        os.pwrite(mem, self._path, process.spare)
        try:
            there = process.open(process.spare, _OPEN)
        finally:
            os.pwrite(mem, before, process.spare)
        try:
            process.map_over(start, stop, there, self.offset)
        finally:
            process.close(there)
        self.offset += stop - start
        return n_bytes

    def _write(self, mem: int, start: int, stop: int) -> int:
        present = resident(self._pid, start, stop)
        os.ftruncate(self._descriptor, self.offset + stop - start)
        for at in range(start, stop, _PIECE_BYTES):
            n = min(_PIECE_BYTES, stop - at)
            pages = present[(at - start) // PAGE_BYTES : (at - start + n) // PAGE_BYTES]
            if not pages.any():
                continue
            piece = memoryview(self._buffer)[:n]
            if os.preadv(mem, [piece], at) != n:
                raise OSError(errno.EIO, "a page of it can't be read")
            not_zero = np.frombuffer(piece, np.uint8).any()
            if not_zero and os.pwrite(self._descriptor, piece, self.offset + at - start) != n:
                raise OSError(errno.ENOSPC, "the disk is full")
        return int(present.sum()) * PAGE_BYTES


@contextlib.contextmanager
def _file_for(pid: int, folder: str) -> Iterator[tuple[int, bytes]]:
    """A file without a name, and a path by which the process, and nobody else, can open it meanwhile."""
    descriptor = open_unlinked(folder)
    holder = os.getpid()
    helper = 0
    try:
        owner = Path(f"/proc/{pid}").stat()
        if owner.st_uid != os.geteuid():
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
            helper = holder = _holder(pid)
        yield descriptor, f"/proc/{holder}/fd/{descriptor}".encode() + b"\0"
    finally:
        os.close(descriptor)
        if helper:
            os.kill(helper, signal.SIGKILL)
            os.waitpid(helper, 0)


def _holder(pid: int) -> int:
    """A child of ours as the process' user: that one may not open the files of root's processes."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    user, group = (
        next(int(line.split()[1]) for line in status if line.startswith(name)) for name in ("Uid:", "Gid:")
    )
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(group)
            os.setuid(user)
            ctypes.CDLL(None).prctl(_SET_DUMPABLE, 1, 0, 0, 0)
            os.write(told, b"1")
            while True:
                signal.pause()
        finally:
            os._exit(1)
    os.close(told)
    os.read(ready, 1)
    os.close(ready)
    return child
