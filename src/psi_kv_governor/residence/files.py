"""Files without a name in a folder that is ours and only ours: parked context is private data."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import statistics
import threading
import time
from collections.abc import Iterator

PROBE_BYTES = 4 << 20
"""What the write speed is measured on: above the caches of a cheap card, and 0.2 s at its 20 MB/s."""
PROBE_S = 0.3
"""Longest that the measurement may take; what was written until then counts. Waiting for a processor is not
the disk's: it is left out ..."""
PROBE_MOST_S = 1.5
"""... up to so much in all."""

_CHUNK_BYTES = 256 << 10
_NO_TMPFILE = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS, errno.ENOENT})
_OWN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC if hasattr(os, "O_DIRECTORY") else 0

_speeds: dict[int, float] = {}
"""Measured bytes a second by st_dev, for the life of this process."""


def own_folder_name() -> str:
    """The name of our folder in a folder that others may use too."""
    return f"psi-kv-{os.geteuid()}"


@contextlib.contextmanager
def own_folder(path: str) -> Iterator[int]:
    """A descriptor of the folder `path`, which is made 0700 where it is absent (its parent must be there).

    Raises PermissionError where it belongs to somebody else, is a link, or can't be closed to others, and
    OSError for everything else.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)  # noqa: PTH102
    try:
        descriptor = os.open(path, _OWN)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise PermissionError(errno.EPERM, "it is a link or a file, and no folder") from error
        raise
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, f"it belongs to user {found.st_uid}")
        if stat.S_IMODE(found.st_mode) & 0o077:
            os.fchmod(descriptor, 0o700)
        yield descriptor
    finally:
        os.close(descriptor)


def open_unlinked(path: str) -> int:
    """Open a new file that has no name in our folder `path`, 0600, for reading and writing.

    Where the filesystem has no O_TMPFILE the file has a random name for the moment between two calls, and
    not a byte in it. Raises OSError.
    """
    with own_folder(path) as folder:
        return _open_unlinked(folder)[0]


def _open_unlinked(folder: int) -> tuple[int, bool]:
    """The file, and whether O_TMPFILE made it."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(".", flags | os.O_TMPFILE, 0o600, dir_fd=folder), True
    except OSError as error:
        if error.errno not in _NO_TMPFILE:
            raise
    name = f".{secrets.token_hex(8)}"
    descriptor = os.open(name, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=folder)
    os.unlink(name, dir_fd=folder)
    return descriptor, False


def try_out(path: str) -> tuple[bool, float]:
    """Make a file in our folder `path` and write to it: whether O_TMPFILE works, and bytes a second.

    The speed is measured once a device for the life of the process; 0 where not a chunk was written in
    time, or where the disk is full at the moment. Raises OSError where no file can be made at all.
    """
    with own_folder(path) as folder:
        descriptor, tmpfile = _open_unlinked(folder)
    device = os.fstat(descriptor).st_dev
    if device in _speeds:
        os.close(descriptor)
    else:
        _speeds[device] = _write_speed(descriptor)
    return tmpfile, _speeds[device]


def _write_speed(descriptor: int) -> float:
    """Bytes a second down to the device, by the median piece. Closes `descriptor`.

    A piece that waited for somebody else's writing says nothing of the disk: a mean took a busy one of 1 GB/s
    for one of 30 MB/s. Nor does the time in which the thread waited for a processor: beside fifteen busy
    programs on two cores a disk of 1 GB/s was taken for one of 20 MB/s, its cache was not born in a file, and
    a model died where plain llama.cpp lived.

    A stuck disk holds a writing thread for as long as it likes, so another one is sent, and waited for only
    so long.
    """
    pieces_s: list[float] = []
    latest_s = time.monotonic() + PROBE_MOST_S

    def write() -> None:
        thread = threading.get_native_id()
        started_s = _working_s(thread)
        try:
            chunk = memoryview(os.urandom(_CHUNK_BYTES))  # zeros may never reach the device
            for offset in range(0, PROBE_BYTES, _CHUNK_BYTES):
                began_s = _working_s(thread)
                os.pwrite(descriptor, chunk, offset)
                os.fdatasync(descriptor)
                pieces_s.append(_working_s(thread) - began_s)
                if _working_s(thread) - started_s > PROBE_S or time.monotonic() > latest_s:
                    return
        except OSError:
            return
        finally:
            os.close(descriptor)

    writer = threading.Thread(target=write, name="psi-kv-disk-probe", daemon=True)
    try:
        writer.start()
    except RuntimeError:  # no thread is to be had: nothing is known of the disk
        os.close(descriptor)
        return 0.0
    started_s = time.monotonic()
    writer.join(PROBE_S)
    while writer.is_alive() and time.monotonic() < latest_s:
        if _working_s(writer.native_id or 0) - started_s > PROBE_S:
            break
        writer.join(PROBE_S / 10)
    return _CHUNK_BYTES / max(statistics.median(pieces_s), 1e-9) if pieces_s else 0.0


def _working_s(thread: int) -> float:
    """A clock that stands still while this thread of ours is ready to run and has no processor. Where the
    kernel does not count that (`schedstat`), it never does."""
    now_s = time.monotonic()
    try:
        with open(f"/proc/self/task/{thread}/schedstat", "rb") as file:
            return now_s - int(file.read().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return now_s
