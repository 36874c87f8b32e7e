"""Runs somebody's program as its parent: its terminal, its signals and its exit status stay its own."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from psi_kv_governor.errors import BadInputError

NOT_FOUND, NOT_EXECUTABLE = 127, 126
"""Exit statuses of a program that can't be started, as shells give them."""


def _signals(*names: str) -> tuple[signal.Signals, ...]:
    """Those of `names` that there are: `doctor` runs on systems that have few of them."""
    return tuple(signal.Signals[name] for name in names if name in signal.Signals.__members__)


_HANDED_ON = _signals(
    "SIGTERM", "SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGWINCH", "SIGCONT"
)  # fmt: skip
_ENDS = set(_signals("SIGTERM", "SIGHUP", "SIGINT", "SIGQUIT"))
_LOOK_S = 0.5
_OF_PYTHON = _signals("SIGPIPE", "SIGXFSZ")
"""Python ignores them from its start, and a program would inherit that."""
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


def find_program(name: str, environ: Mapping[str, str]) -> Path:
    """The executable `name`. Raises CannotStartError."""
    path = shutil.which(name, path=environ.get("PATH", os.defpath))
    if path is not None:
        return Path(path)
    if os.sep in name and Path(name).is_dir():
        raise CannotStartError(f"{name} is a folder: name the program in it", NOT_EXECUTABLE)
    if os.sep in name and Path(name).exists():
        raise CannotStartError(f"{name} is not executable: chmod +x {name}", NOT_EXECUTABLE)
    raise CannotStartError(f"{name} was not found: is it installed, and in PATH?", NOT_FOUND)


class HeldSignals:
    """While it is open, the signals that belong to the program wait for `Program.wait`.

    Opened before any other thread of this process is started (numpy starts some when it is imported): a
    thread that does not block a signal may be given it, and the process would end by it.
    """

    def __init__(self) -> None:
        self.before: set[int] = set()
        """The mask that the program starts with."""

    def __enter__(self) -> HeldSignals:
        self.before = set(signal.pthread_sigmask(signal.SIG_BLOCK, {*_HANDED_ON, signal.SIGCHLD}))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Signals are this process' again; those that came meanwhile take effect now."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self.before)

    def wait_for(self, pid: int) -> None:
        """Until the process ends, which is no child of ours, or we are told to end."""
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            ended = select.poll()
            ended.register(process, select.POLLIN)
            while not ended.poll(0):
                told = signal.sigtimedwait(_ENDS, _LOOK_S)
                if told is not None:
                    return
        finally:
            os.close(process)

    def forget(self) -> None:
        """Drop the signals that came too late for the program: it has ended, its status is what counts."""
        while signal.sigtimedwait({*_HANDED_ON, signal.SIGCHLD}, 0) is not None:
            pass


class Program:
    """A running child of ours. Signals that this process is sent are handed on to it."""

    def __init__(
        self, command: Sequence[str], path: Path, environ: Mapping[str, str], held: HeldSignals
    ) -> None:
        """Raises CannotStartError where the kernel refuses it."""
        if signal.sigpending() & _ENDS:
            held.release()  # we were told to end before there was a program
        ignored = {s for s in _HANDED_ON if signal.getsignal(s) is signal.SIG_IGN}  # nohup, a background job
        try:
            self.pid = os.posix_spawn(
                str(path), list(command), dict(environ), setsigmask=held.before,
                setsigdef={*_OF_PYTHON, *_HANDED_ON} - ignored,
            )  # fmt: skip
        except OSError as error:
            raise _cannot_start(path, error) from error
        except ValueError as error:  # a NUL in an argument
            raise CannotStartError(f"{path} can't be started: {error}", NOT_EXECUTABLE) from error

    def wait(self) -> int:
        """Hand signals on until the program has ended; gives its wait status. Reaps others' orphans as well,
        which are left to us where we are the first process of a container."""
        while True:
            ended = self._reaped()
            if ended is not None:
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


def _cannot_start(path: Path, error: OSError) -> CannotStartError:
    why, status = error.strerror or str(error), NOT_EXECUTABLE
    if error.errno == errno.ENOENT and path.exists():  # the kernel speaks of the interpreter
        why = "the interpreter that it names is not there"
        status = NOT_FOUND
    elif error.errno == errno.ENOENT:
        status = NOT_FOUND
    elif error.errno == errno.ENOEXEC:
        why = "it is no program of this machine (another architecture?), and no script that begins with #!"
    return CannotStartError(f"{path} can't be started: {why}", status)


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
