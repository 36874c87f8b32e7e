"""What a seccomp filter kills for. It can't be asked, so another process, which inherits it, tries."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

_CALLS = (
    "bind", "chmod", "clock_nanosleep", "epoll_create1", "epoll_ctl", "epoll_wait", "fallocate", "fdatasync",
    "flock", "ftruncate", "getsockname", "listen", "madvise", "mkdir", "poll", "posix_fadvise", "pwrite",
    "rename", "rmdir", "send", "socket", "socketpair", "statfs", "sync_file_range", "unlink", "unlinkat",
)  # fmt: skip
"""What the governor and the agent call, and a program that only decodes may not. Functions of libc of the
call's name or near it; all of them refuse the arguments that they get here."""

_TRY = """
import ctypes, os, signal, sys
libc, wrong = ctypes.CDLL(None), ctypes.c_long(-1)
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        getattr(libc, name)(wrong, 0, 0, 0, 0, 0)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSYS:
        print(name)
"""


@functools.cache
def filtered(status: Path = Path("/proc/self/status")) -> bool:
    """Whether this process is under a seccomp filter (`Seccomp: 2`, as in every container)."""
    try:
        return any(line.split() == ["Seccomp:", "2"] for line in status.read_text().splitlines())
    except OSError:
        return sys.platform == "linux"


@functools.cache
def killing_calls() -> tuple[str, ...]:
    """What of all that the governor would call is death here: such a filter lets a model run, and not a
    governor beside it. Starting a process is taken for allowed. Raises nothing."""
    if not filtered() or not sys.executable:
        return ()
    try:
        # One pipe and no timeout: for more, subprocess calls poll, which may be what is filtered.
        tried = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRY, *_CALLS],
            check=False, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(name for name in tried.stdout.split() if name in _CALLS)
