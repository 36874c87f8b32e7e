"""Runs the `psi-kv` command as on a system that lacks what only Linux, or only POSIX, has.

    python other_system.py {darwin,win32} ARGUMENT...

The libraries that the package stands on are imported first: they look at the platform by themselves.
"""

from __future__ import annotations

import errno
import importlib
import mmap
import os
import select
import signal
import socket
import sys
import types

LIBRARIES = """
    asyncio click concurrent.futures hashlib importlib.metadata logging msgspec multiprocessing.connection
    numpy platformdirs psutil rich.console rich.live rich.progress selectors shutil socket subprocess tempfile
    urllib.request zipfile
"""
NOT_LINUX: dict[types.ModuleType, str] = {
    os: """
        O_DIRECT O_TMPFILE POSIX_FADV_DONTNEED eventfd memfd_create posix_fadvise posix_fallocate preadv
        sched_getaffinity
    """,
    mmap: "MADV_HUGEPAGE MADV_NOHUGEPAGE MADV_POPULATE_WRITE MAP_POPULATE",
    select: "POLLPRI epoll",
    socket: "SO_PEERCRED",
}
NOT_POSIX: dict[types.ModuleType, str] = {
    os: """
        O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK fchmod fork getegid geteuid getgid getloadavg getuid
        mkfifo pread pwrite pwritev register_at_fork set_blocking statvfs sysconf uname
    """,
    mmap: "MADV_DONTNEED MADV_FREE MAP_ANONYMOUS MAP_PRIVATE MAP_SHARED PROT_READ PROT_WRITE",
    select: "POLLERR POLLHUP POLLIN POLLNVAL poll",
    socket: "AF_UNIX",
    signal: "SIGALRM SIGHUP SIGKILL SIGUSR1 SIGUSR2",
}
NOT_ON = {"darwin": (NOT_LINUX,), "win32": (NOT_LINUX, NOT_POSIX)}
MODULES = {"darwin": "", "win32": "fcntl grp pty pwd readline resource termios tty"}


def become(platform: str) -> None:
    """Take away what `platform` lacks."""
    for name in LIBRARIES.split():
        importlib.import_module(name)
    sys.platform = platform
    for name in MODULES[platform].split():
        sys.modules[name] = None  # type: ignore[assignment]  # importing it raises ImportError
    for missing in NOT_ON[platform]:
        for module, names in missing.items():
            for name in names.split():
                if hasattr(module, name):
                    delattr(module, name)
    sys.addaudithook(hide)


def hide(event: str, arguments: tuple[object, ...]) -> None:
    """No file below /proc or /sys can be opened: these folders are Linux's. psutil has its own ways there."""
    if event not in {"open", "os.listdir", "os.scandir"}:
        return
    by = str(sys._getframe(1).f_globals.get("__name__"))
    if str(arguments[0]).startswith(("/proc/", "/sys/")) and not by.startswith("psutil"):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(arguments[0]))


if __name__ == "__main__":
    become(sys.argv[1])
    from psi_kv_governor.cli import main

    sys.argv = ["psi-kv", *sys.argv[2:]]
    main()
