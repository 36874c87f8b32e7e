"""systemd's way to tell a service of memory pressure: two environment variables.

MEMORY_PRESSURE_WATCH is an absolute path: a PSI file, a FIFO or a stream socket; MEMORY_PRESSURE_WRITE, if
set, what to write into it first, in base64. The protocol: https://systemd.io/PRESSURE/.
"""

from __future__ import annotations

import base64
import binascii
import os
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from psi_kv_governor.errors import BadInputError
from psi_kv_governor.pressure.waker import PsiTrigger, StreamWaker, Waker, arm

WATCH, WRITE = "MEMORY_PRESSURE_WATCH", "MEMORY_PRESSURE_WRITE"
OFF = "/dev/null"


class Watch(NamedTuple):
    """What the service manager asks this process to watch."""

    path: Path
    first: bytes
    """What to write first; empty for nothing."""
    off: bool = False
    """Whether memory pressure is not to be handled at all (MemoryPressureWatch=off in the unit)."""


def parse_watch(environ: Mapping[str, str]) -> Watch | None:
    """What the environment asks for; None where it asks for nothing. Raises BadInputError for garbage."""
    path = environ.get(WATCH, "")
    if not path:
        return None
    if path == OFF:
        return Watch(Path(path), b"", off=True)
    if not path.startswith("/") or "\0" in path:
        raise BadInputError(f"{WATCH}={path!r} is no absolute path")
    try:
        first = base64.b64decode(environ.get(WRITE, ""), validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: not ASCII
        raise BadInputError(f"{WRITE} is not base64: {error}") from error
    return Watch(Path(path), first)


def is_off(environ: Mapping[str, str]) -> bool:
    """Whether the service manager turned memory pressure handling off for this process."""
    return environ.get(WATCH) == OFF


def open_watch(watch: Watch) -> Waker:
    """Open what is to be watched, by its kind, and write into it first what there is to be written.

    Raises OSError where it cannot be opened or written, BadInputError where it is of no kind that is known.
    """
    mode = watch.path.stat().st_mode
    if stat.S_ISREG(mode):
        # Without a string to write nothing would ever fire: then the trigger is one of our own.
        return PsiTrigger(watch.path, watch.first) if watch.first else arm(watch.path)
    if stat.S_ISFIFO(mode):
        # For reading and writing: with no writer left a FIFO that is only read is at its end for ever.
        descriptor = os.open(watch.path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        # What is written comes back as a first event: one reading more.
        return StreamWaker(f"FIFO {watch.path}", descriptor, watch.first)
    if stat.S_ISSOCK(mode):
        return StreamWaker(f"socket {watch.path}", _connect(watch.path), watch.first)
    raise BadInputError(f"{watch.path} is neither a PSI file, nor a FIFO, nor a socket")


def _connect(path: Path) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.setblocking(False)  # a listener whose backlog is full must not stop the governor
        client.connect(str(path))
        return client.detach()
