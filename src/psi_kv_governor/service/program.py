"""Runs somebody's program as its parent: its terminal, its signals and its exit status stay its own."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import stat
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from psi_kv_governor.errors import BadInputError

NOT_FOUND, NOT_EXECUTABLE = 127, 126
"""Exit statuses of a program that can't be started, as shells give them."""

_HANDED_ON = (
    signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
    signal.SIGWINCH, signal.SIGCONT,
)  # fmt: skip
_FROM_KERNEL = 0x80
"""`si_code` of a signal that the kernel sent (siginfo.h: SI_KERNEL), for instance for Ctrl-C: the terminal
sends it to the program as well."""


class CannotStartError(BadInputError):
    """A program that can't be started. `status` is what a shell would end with."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status

    @property
    def exit_status(self) -> int:  # type: ignore[override]
        return self.status


class Found(NamedTuple):
    """A program that can be started."""

    path: Path
    unreached: str
    """Why the agent will not be in it, or ''."""


def find_program(name: str, environ: Mapping[str, str]) -> Found:
    """The executable `name`. Raises CannotStartError."""
    path = shutil.which(name, path=environ.get("PATH", os.defpath))
    if path is None:
        if os.sep in name and Path(name).exists():
            raise CannotStartError(f"{name} is not executable: chmod +x {name}", NOT_EXECUTABLE)
        raise CannotStartError(f"{name} was not found: is it installed, and in PATH?", NOT_FOUND)
    return Found(Path(path), _why_unreached(Path(path)))


def _why_unreached(path: Path) -> str:
    status = path.stat()
    if status.st_mode & (stat.S_ISUID | stat.S_ISGID):
        return "it is setuid, and the loader ignores LD_PRELOAD for it: start it as the user it changes to"
    with contextlib.suppress(OSError):
        head, ours = (_head(one) for one in (path, Path("/proc/self/exe")))
        if head[:4] == b"\x7fELF":
            if head[4] != ours[4] or head[18:20] != ours[18:20]:
                return "it is built for another architecture"
            if b"ld-musl" in head:
                return "it is built against musl, and this agent against glibc"
    return ""


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096)


class Program:
    """A running child of ours. Signals that this process is sent are handed on to it."""

    def __init__(self, command: Sequence[str], path: Path, environ: Mapping[str, str]) -> None:
        """Raises CannotStartError where the kernel refuses it."""
        # Blocked from before it starts, so that none is lost; the program gets them unblocked.
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, {*_HANDED_ON, signal.SIGCHLD})
        try:
            self.pid = os.posix_spawn(
                str(path), list(command), dict(environ), setsigmask=self._before,
                setsigdef=[s for s in _HANDED_ON if signal.getsignal(s) is not signal.SIG_IGN],
            )  # fmt: skip
        except OSError as error:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._before)
            status = NOT_FOUND if error.errno == errno.ENOENT else NOT_EXECUTABLE
            raise CannotStartError(f"{path} can't be started: {error.strerror}", status) from error
        self._ended = threading.Event()

    def wait(self) -> int:
        """Hand signals on until the program has ended; gives its wait status. Reaps others' orphans as well,
        which are left to us where we are the first process of a container."""
        while True:
            ended = self._reaped()
            if ended is not None:
                signal.pthread_sigmask(signal.SIG_SETMASK, self._before)
                return ended
            told = signal.sigwaitinfo({*_HANDED_ON, signal.SIGCHLD})
            if told.si_signo != signal.SIGCHLD and told.si_code != _FROM_KERNEL:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, told.si_signo)

    def _reaped(self) -> int | None:
        own = None
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return own
            if pid == 0:
                return own
            if pid == self.pid:
                own = status


def end_as(status: int) -> int:
    """End as the program did: gives its exit status, or is killed by the same signal."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if os.getpid() != 1:  # the first process of a container is not killed by its own signals
            # Without a core of ours: the program left one if one was wanted.
            with contextlib.suppress(ImportError, ValueError, OSError):
                import resource

                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            with contextlib.suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        return 128 + number
    return os.waitstatus_to_exitcode(status)
