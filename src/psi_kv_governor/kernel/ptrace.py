"""Stops every thread of another process for a moment, and has it make system calls meanwhile.

Registers, signal masks and interrupted calls are as before when it goes on. Whoever calls stays in one
thread: the kernel knows tracers by thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.kernel.memory import FIXED, PRIVATE, READ_WRITE

# <linux/ptrace.h>, the same on every architecture.
_CONT, _DETACH, _SYSCALL = 7, 17, 24
_GETREGSET, _SETREGSET, _SEIZE, _INTERRUPT = 0x4204, 0x4205, 0x4206, 0x4207
_GETSIGMASK, _SETSIGMASK = 0x420A, 0x420B
_PRSTATUS = 1  # NT_PRSTATUS, <linux/elf.h>
_TRACESYSGOOD = 1
_ALL_THREADS = 0x40000000  # __WALL
_EVENT_STOP = 128  # PTRACE_EVENT_STOP: it stopped because we asked
_SYSCALL_STOP = 0x80
_PATIENCE_S = 2.0
"""Longest that a thread may take to stop: one that waits for a disk, or for a child of vfork, can't."""
_LOOK_S = 0.0002


class _Machine(NamedTuple):
    """How an architecture makes a system call. Registers are counted in 8 bytes of its NT_PRSTATUS."""

    registers: int
    number: int
    arguments: tuple[int, ...]
    result: int
    counter: int
    stack: int
    interrupted: int | None
    """Where the number of an interrupted call stands: -1 there says that there is none to repeat."""
    instruction: bytes
    openat: int
    mmap: int
    close: int


_MACHINES = {
    # struct user_regs_struct, <asm/user_64.h>
    "x86_64": _Machine(27, 10, (14, 13, 12, 7, 9, 8), 10, 16, 19, 15, b"\x0f\x05", 257, 9, 3),
    # struct user_pt_regs, <asm/ptrace.h>: x0 to x30, sp, pc, pstate
    "aarch64": _Machine(34, 8, (0, 1, 2, 3, 4, 5), 0, 32, 31, None, b"\x01\x00\x00\xd4", 56, 222, 57),
}


class CannotStopError(PsiKvError):
    """The process can't be stopped, for the reason given."""


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    libc.ptrace.restype = ctypes.c_long
    return libc


def _ptrace(request: int, thread: int, address: int = 0, data: int = 0) -> None:
    if _libc().ptrace(request, thread, address, data) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def machine() -> _Machine:
    """This machine's. Raises CannotStopError for one that nobody has written down."""
    known = _MACHINES.get(platform.machine())
    if known is None:
        raise CannotStopError(f"system calls of another process can't be made on {platform.machine()} yet")
    return known


class Stopped:
    """A process of which no thread runs, until the end of `stopped`."""

    def __init__(self, pid: int, threads: list[int], instruction: int) -> None:
        self._thread = threads[0] if pid not in threads else pid
        self._instruction = instruction
        self._machine = machine()
        self._before = self._registers()
        self._mask = (ctypes.c_uint64 * 1)()
        _ptrace(_GETSIGMASK, self._thread, 8, ctypes.addressof(self._mask))
        self._changed = False

    def _registers(self) -> Any:
        values = (ctypes.c_uint64 * self._machine.registers)()
        vector = _Vector(ctypes.addressof(values), ctypes.sizeof(values))
        _ptrace(_GETREGSET, self._thread, _PRSTATUS, ctypes.addressof(vector))
        return values

    def _set(self, values: Any) -> None:
        vector = _Vector(ctypes.addressof(values), ctypes.sizeof(values))
        _ptrace(_SETREGSET, self._thread, _PRSTATUS, ctypes.addressof(vector))

    @property
    def spare(self) -> int:
        """An address below the stack that is in use, and below what the ABI lets a function use beyond it."""
        return int(self._before[self._machine.stack]) - 1024

    def open(self, path_at: int, flags: int) -> int:
        """openat(2) of the path that stands at `path_at` in its memory. Raises OSError."""
        return self._call(self._machine.openat, -100 & (2**64 - 1), path_at, flags)

    def map_over(self, start: int, stop: int, descriptor: int, offset: int) -> None:
        """mmap(2): a private mapping of the file takes the place of what is there. Raises OSError."""
        flags = FIXED | PRIVATE
        self._call(self._machine.mmap, start, stop - start, READ_WRITE, flags, descriptor, offset)

    def close(self, descriptor: int) -> None:
        """close(2). Raises OSError."""
        self._call(self._machine.close, descriptor)

    def _call(self, number: int, *arguments: int) -> int:
        if not self._changed:
            everything = (ctypes.c_uint64 * 1)(2**64 - 1)  # no handler of the program runs now
            _ptrace(_SETSIGMASK, self._thread, 8, ctypes.addressof(everything))
            self._changed = True
        values = type(self._before)(*self._before)
        if self._machine.interrupted is not None:
            values[self._machine.interrupted] = 2**64 - 1
        values[self._machine.counter] = self._instruction
        for where, value in zip(self._machine.arguments, arguments, strict=False):
            values[where] = value
        values[self._machine.number] = number
        self._set(values)
        for _ in ("into the call", "out of it"):
            _ptrace(_SYSCALL, self._thread)
            _wait(self._thread, _at_a_call, resume=_SYSCALL)
        result = ctypes.c_int64(self._registers()[self._machine.result]).value
        if -4096 < result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def restore(self) -> None:
        """All as it was. It is stopped once more by us before it goes on: there the kernel repeats a call
        that was interrupted, as it would have."""
        if not self._changed:
            return
        self._set(self._before)
        _ptrace(_SETSIGMASK, self._thread, 8, ctypes.addressof(self._mask))
        _ptrace(_INTERRUPT, self._thread)
        _ptrace(_CONT, self._thread)
        _wait(self._thread, _as_asked)
        self._changed = False


def _as_asked(status: int) -> bool:
    return status >> 16 == _EVENT_STOP


def _at_a_call(status: int) -> bool:
    return os.WSTOPSIG(status) & _SYSCALL_STOP != 0


def _wait(thread: int, wanted: Callable[[int], bool], *, resume: int = _CONT) -> None:
    """Until the thread has stopped as `wanted`; from other stops it is resumed. Raises CannotStopError."""
    until_s = time.monotonic() + _PATIENCE_S
    last = False
    while not last:
        last = time.monotonic() >= until_s  # before the look: we may have stood still ourselves until then
        try:
            pid, status = os.waitpid(thread, os.WNOHANG | _ALL_THREADS)
        except ChildProcessError:
            raise CannotStopError("it ended meanwhile") from None
        if pid == 0:
            time.sleep(_LOOK_S)
        elif not os.WIFSTOPPED(status):
            raise CannotStopError("it ended meanwhile")
        elif wanted(status):
            return
        else:  # a signal on its way: it is the program's
            _ptrace(resume, thread, 0, 0 if status >> 16 else os.WSTOPSIG(status))
    raise CannotStopError("one of its threads does not stop: it waits in the kernel")


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[Stopped]:
    """Every thread of `pid` is stopped within. Raises CannotStopError, and OSError where it may not be."""
    instruction = _instruction(pid)
    threads: list[int] = []
    try:
        while new := [thread for thread in _threads(pid) if thread not in threads]:
            for thread in new:
                try:
                    _ptrace(_SEIZE, thread, 0, _TRACESYSGOOD)
                except ProcessLookupError:
                    continue  # it ended meanwhile
                threads.append(thread)
                _ptrace(_INTERRUPT, thread)
            for thread in [one for one in new if one in threads]:
                try:
                    _wait(thread, _as_asked)
                except CannotStopError as error:
                    if "ended" not in str(error):
                        raise
                    threads.remove(thread)
        if not threads:
            raise CannotStopError("it ended meanwhile")
        process = Stopped(pid, threads, instruction)
        try:
            yield process
        finally:
            process.restore()
    finally:
        for thread in threads:
            with contextlib.suppress(OSError):
                _ptrace(_DETACH, thread)


def _threads(pid: int) -> list[int]:
    try:
        return [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]
    except FileNotFoundError:
        raise CannotStopError("it ended meanwhile") from None


def _instruction(pid: int) -> int:
    """Where in its memory stands the instruction for a system call: the kernel's own page has one."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if line.endswith("[vdso]"):
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
                memory.seek(first)
                found = memory.read(last - first).find(machine().instruction)
            if found >= 0:
                return first + found
    raise CannotStopError("it has no page of the kernel's (vdso) in its memory")
