"""Where the status sockets of governed processes are: made, found, and cleared away after a kill.

A socket is `<pid>-<n>.sock`, mode 0600, in a 0700 folder of the user: unix(7). The next who looks removes
those that nobody listens on any more.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import stat
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.user_folders import cache_folder

_WAITING_CLIENTS = 8

_LONGEST_PATH = 103
"""sun_path of macOS holds 104 bytes with the zero at its end, of Linux 108: unix(7)."""
_NAME = re.compile(r"(\d{1,10})-(\d{1,6})\.sock")
_LONGEST_NAME = "/4294967296-999999.sock.new"
_numbers = itertools.count(1)


class Found(NamedTuple):
    """A socket that answers."""

    pid: int
    path: Path


def able() -> bool:
    """Whether this platform has Unix sockets."""
    return hasattr(socket, "AF_UNIX")


def folders() -> Iterator[Path]:
    """Where sockets may be, the best first. A path too long for a socket is left out. Raises nothing."""
    service = Path(os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0])  # of a systemd unit
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    login = Path(f"/run/user/{_own_id()}")  # the same, for who was started without the variable
    for parent in dict.fromkeys((service, runtime, login)):
        if parent.is_absolute() and _is_folder(parent):
            yield from _short(parent / "psi-kv")
    for named in ("CACHE_DIRECTORY", "STATE_DIRECTORY"):
        parent = Path(os.environ.get(named, "").partition(":")[0])
        if parent.is_absolute():
            yield from _short(parent / "psi-kv-run")
    cache = cache_folder()
    if cache.is_absolute():  # without HOME and passwd entry it is "~/.cache": a folder of that name
        yield from _short(cache / "run")
    with contextlib.suppress(FileNotFoundError):  # no folder can be written to at all
        yield from _short(Path(tempfile.gettempdir()) / f"psi-kv-{_own_id()}")


def _is_folder(path: Path) -> bool:
    """Path.is_dir raises where /run/user can't be entered, as under ProtectHome=."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _short(folder: Path) -> Iterator[Path]:
    if len(os.fsencode(folder)) + len(_LONGEST_NAME) <= _LONGEST_PATH:
        yield folder


def _own_id() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0


def private(folder: Path) -> bool:
    """Whether `folder` is a real folder of this user that nobody else can enter."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == _own_id() and not found.st_mode & 0o077


def find() -> list[Found]:
    """Every governed process of this user that answers. Sockets of processes that ended are removed."""
    found = []
    for folder in folders():
        if able() and private(folder):
            found += [Found(pid, path) for pid, path in _sockets(folder) if _answers(path)]
    return sorted(set(found))


def _sockets(folder: Path) -> Iterator[tuple[int, Path]]:
    with contextlib.suppress(OSError):
        for entry in sorted(folder.iterdir()):
            if match := _NAME.fullmatch(entry.name):
                yield int(match[1]), entry


def _answers(path: Path) -> bool:
    """Whether somebody listens; a socket that nobody listens on any more is removed."""
    try:
        connect(path).close()
    except ConnectionRefusedError:
        # Only sockets that listen get their name (see `listen`): its process has ended, or been killed.
        with contextlib.suppress(OSError):
            path.unlink()
        return False
    except OSError:
        return False
    return True


def connect(path: Path, timeout_s: float = 2.0) -> socket.socket:
    """A connection to the socket at `path`. Raises OSError."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(timeout_s)
    try:
        client.connect(str(path))
    except BaseException:
        client.close()
        raise
    return client


def listen() -> tuple[socket.socket, Path]:
    """A listening socket in the first folder that can be had. Raises PsiKvError."""
    why = "no folder for it has a path that is short enough"
    for folder in folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not private(folder):
                why = f"{folder} is not this user's alone: chmod 700 it, or remove it"
                continue
            for _, path in _sockets(folder):
                _answers(path)  # removes it where nobody does
            return _bound(folder)
        except OSError as error:
            why = f"{folder}: {error.strerror}"
    raise PsiKvError(f"no status socket: {why}")


def _bound(folder: Path) -> tuple[socket.socket, Path]:
    path = folder / f"{os.getpid()}-{next(_numbers)}.sock"
    early = path.with_name(f"{path.name}.new")
    early.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        server.bind(str(early))
        early.chmod(0o600)
        server.listen(_WAITING_CLIENTS)
        server.setblocking(False)
        early.rename(path)  # whoever sees this name finds somebody who listens
    except BaseException:
        server.close()
        early.unlink(missing_ok=True)
        raise
    return server, path


def same_user(connection: socket.socket) -> bool:
    """Whether the other side is this user, or root; where the kernel does not tell, the folder decides.

    SO_PEERCRED gives pid, uid and gid of whoever connected: unix(7).
    """
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    answer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid = struct.unpack("3i", answer)[1]
    return uid in {0, os.getuid()}
