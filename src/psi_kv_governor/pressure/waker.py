"""What can end the loop's sleep early: a PSI trigger, or a FIFO or socket that a service manager writes to.

A waker only wakes. What it woke for is decided by the reading that follows: the first event of an
unprivileged trigger can be false, and one window gives one event however long the stall.
Kernel: Documentation/accounting/psi.rst; systemd: https://systemd.io/PRESSURE/.
"""

from __future__ import annotations

import errno
import os
import select
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from psi_kv_governor.errors import BadInputError, SourceLostError
from psi_kv_governor.pressure.psi import parse_psi

QUICK_TRIGGER = b"some 50000 500000\0"
"""50 ms of stall in half a second. The kernel looks ten times a window, so it wakes within 50 ms of that;
it wants CAP_SYS_RESOURCE for a window that is no multiple of 2 s."""

PLAIN_TRIGGER = b"some 100000 2000000\0"
"""100 ms of stall in 2 s: half of what trims by default, so that the loop is awake before it has to act.
The kernel looks at an unprivileged trigger every 2 s only: it can shorten a longer sleep, no more."""

_DRAIN_BYTES = 1 << 16  # a pipe's whole buffer


class Waker(Protocol):
    """A descriptor that becomes ready under pressure."""

    @property
    def name(self) -> str:
        """What is watched, in words a user can follow up."""

    @property
    def mask(self) -> int:
        """The events to poll for."""

    def fileno(self) -> int:
        """The descriptor to poll."""

    def answer(self, events: int) -> bool:
        """Take in what poll gave; whether it was a sign of pressure. Raises SourceLostError at its end."""

    def close(self) -> None:
        """Give back the descriptor. Safe to call twice."""


@contextmanager
def _closed_on_failure(waker: Waker) -> Iterator[None]:
    """Its descriptor is given back where it can't be made."""
    try:
        yield
    except BaseException:
        waker.close()
        raise


class PsiTrigger:
    """A trigger armed on a PSI file: one descriptor, disarmed by closing it (which takes the kernel 8-16 ms).

    Raises OSError on creation with the kernel's refusal: EINVAL (the string, or a window that wants
    CAP_SYS_RESOURCE), EBUSY (armed already), EACCES and EPERM (no right to write), ENOENT and EOPNOTSUPP
    (no PSI). Raises BadInputError for a file that is no PSI file: nothing is written to it.
    """

    def __init__(self, path: Path, spec: bytes) -> None:
        """`spec` as psi.rst has it; a NUL is put behind it where it has none."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        with _closed_on_failure(self):
            _check_kernel_file(path, self._descriptor)
            # The kernel overwrites the last byte with a NUL: without one of its own a number loses a digit.
            os.write(self._descriptor, spec if spec.endswith(b"\0") else spec + b"\0")

    @property
    def name(self) -> str:
        """What is watched."""
        return f"trigger on {self.path}"

    @property
    def mask(self) -> int:
        """POLLPRI alone: a PSI file is always readable."""
        return select.POLLPRI

    def fileno(self) -> int:
        """The descriptor to poll; never read from."""
        return self._descriptor

    def answer(self, events: int) -> bool:
        """Whether the trigger fired. POLLERR, with or without POLLPRI, means that its cgroup is gone."""
        if events & (select.POLLERR | select.POLLNVAL):
            raise SourceLostError(f"the {self.name} is dead: the cgroup is gone")
        return bool(events & select.POLLPRI)

    def close(self) -> None:
        """Disarm it."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


class StreamWaker:
    """A FIFO or a stream socket: bytes that arrive mean pressure, and are thrown away.

    Takes over `descriptor`. Raises OSError on creation when `first` cannot be written.
    """

    def __init__(self, name: str, descriptor: int, first: bytes = b"") -> None:
        self._name = name
        self._descriptor = descriptor
        with _closed_on_failure(self):
            os.set_blocking(descriptor, False)
            if first and os.write(descriptor, first) != len(first):
                raise OSError(errno.EAGAIN, "it took only a part of MEMORY_PRESSURE_WRITE")

    @property
    def name(self) -> str:
        """What is watched."""
        return self._name

    @property
    def mask(self) -> int:
        """Bytes to read."""
        return select.POLLIN

    def fileno(self) -> int:
        """The descriptor to poll."""
        return self._descriptor

    def answer(self, events: int) -> bool:
        """Empty it. The end of the stream, or an error, is the end of the waker."""
        try:
            data = os.read(self._descriptor, _DRAIN_BYTES)
        except BlockingIOError:
            data, ended = b"", bool(events & (select.POLLERR | select.POLLHUP | select.POLLNVAL))
        except OSError as error:
            raise SourceLostError(f"{self._name} no longer answers: {error.strerror}") from error
        else:
            ended = not data
        if ended:
            raise SourceLostError(f"{self._name} was closed at its other end")
        return bool(data)

    def close(self) -> None:
        """Close the descriptor."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


def arm(path: Path) -> PsiTrigger:
    """A trigger of our own on a PSI file: the quick one where this user may have it, else the plain one.

    Raises what PsiTrigger raises.
    """
    try:
        return PsiTrigger(path, QUICK_TRIGGER)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return PsiTrigger(path, PLAIN_TRIGGER)


def _check_kernel_file(path: Path, descriptor: int) -> None:
    """Refuses what a trigger must not be written to: somebody's file would be overwritten by it.

    A file of the kernel has a size of 0 and yet something to read.
    """
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_size != 0:
        raise BadInputError(f"{path} is no file of the kernel: a trigger can't be armed on it")
    parse_psi(os.pread(descriptor, 512, 0))
