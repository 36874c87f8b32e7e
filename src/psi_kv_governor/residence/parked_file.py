"""One unlinked file that parked pages live in, each at the offset of its address in the mapping."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import weakref

import numpy as np

from psi_kv_governor.kernel import memory
from psi_kv_governor.residence.files import open_unlinked
from psi_kv_governor.residence.parts import bytes_of
from psi_kv_governor.residence.place import Place

BOUNCE_BYTES = 1 << 20
"""Size of the one buffer that bytes go through on their way to a file: trimming allocates nothing."""

_bounce_lock = threading.Lock()
_bounce = mmap.mmap(-1, BOUNCE_BYTES)  # page-aligned, as O_DIRECT wants it
_open_files: weakref.WeakSet[ParkedFile] = weakref.WeakSet()

_AHEAD_BYTES = 128 << 10  # one call is capped to the device's readahead, which is this by default
_NO_ALLOCATE = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV})
_DIRECT = getattr(os, "O_DIRECT", 0)


class ParkedFile:
    """A file of `n_bytes` (a multiple of the page) without a name. Raises OSError on creation."""

    def __init__(self, place: Place, n_bytes: int) -> None:
        self.place = place
        self.frozen = False
        """Another process reads it too (after a fork): nothing may be written to it any more."""
        self.descriptor = open_unlinked(place.folder)
        self._close = weakref.finalize(self, os.close, self.descriptor)
        try:
            memory.keep_in_place(self.descriptor)
            os.ftruncate(self.descriptor, n_bytes)
        except OSError:
            self.close()
            raise
        self._reserved = np.zeros(n_bytes // memory.PAGE_BYTES, dtype=np.bool_)
        self.reserved_bytes = 0
        """Space that it holds on the disk."""
        self._direct = self._set_direct(True)
        _open_files.add(self)

    def reserve(self, start: int, stop: int, *, exactly: bool = False) -> None:
        """Take the space for these bytes now, so that a full disk shows before anything is written.

        With `exactly` a filesystem that can't promise it is an error too. Raises OSError.
        """
        reserved = self._reserved[start // memory.PAGE_BYTES : stop // memory.PAGE_BYTES]
        missing = bytes_of(~reserved)
        if not missing:
            return
        if missing > room_bytes(self.place):
            raise OSError(errno.ENOSPC, f"{self.place.folder} has not so much space above its reserve")
        try:
            memory.allocate(self.descriptor, start, stop - start)
        except OSError as error:
            if exactly or error.errno not in _NO_ALLOCATE:
                raise
        reserved[:] = True
        self.reserved_bytes += missing

    def write(self, start: int, source: memoryview, *, cached: bool) -> None:
        """Write `source` at `start`: past the page cache where the filesystem can, or, `cached`, into it:
        page by page, since what comes in one piece the kernel keeps as one (a large folio) and drops whole.
        What is cached is on its way to the disk then, and not waited for.

        Raises OSError; the bytes at `start` are then old or new.
        """
        direct = self._direct and not cached
        if self._direct:
            self._set_direct(direct)
        try:
            self._write(start, source, memory.PAGE_BYTES if cached else BOUNCE_BYTES)
        except OSError as error:
            if not direct or error.errno != errno.EINVAL:
                raise
            # The flag was taken, but writing with it is not to be had here.
            self._direct = direct = self._set_direct(False)
            self._write(start, source)
        if not direct:
            memory.write_back(self.descriptor, start, len(source), wait=not cached)

    def _write(self, start: int, source: memoryview, at_once: int = BOUNCE_BYTES) -> None:
        with _bounce_lock:
            for done in range(0, len(source), BOUNCE_BYTES):
                n_bytes = min(BOUNCE_BYTES, len(source) - done)
                _bounce[:n_bytes] = source[done : done + n_bytes]
                view = memoryview(_bounce)[:n_bytes]
                sent = 0
                while sent < n_bytes:
                    wrote = os.pwrite(self.descriptor, view[sent : sent + at_once], start + done + sent)
                    if wrote == 0:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    sent += wrote

    def drop(self, start: int, stop: int) -> None:
        """Have the kernel forget the clean pages of this part."""
        memory.drop_file_pages(self.descriptor, start, stop - start)

    def read_in(self, start: int, stop: int) -> None:
        """Have the kernel begin to read this part, and no more than it."""
        for first in range(start, stop, _AHEAD_BYTES):
            n_bytes = min(_AHEAD_BYTES, stop - first)
            os.posix_fadvise(self.descriptor, first, n_bytes, os.POSIX_FADV_WILLNEED)

    def punch(self, start: int, stop: int) -> None:
        """Give the space of this part back, where nobody maps it; what can't be given back stays."""
        try:
            memory.allocate(self.descriptor, start, stop - start, memory.PUNCH_HOLE)
        except OSError:
            return
        reserved = self._reserved[start // memory.PAGE_BYTES : stop // memory.PAGE_BYTES]
        self.reserved_bytes -= bytes_of(reserved)
        reserved[:] = False

    def zero(self, start: int, stop: int) -> None:
        """Make this part zeros, its pages forgotten and its space kept. Raises OSError where it can't."""
        memory.allocate(self.descriptor, start, stop - start, memory.ZERO_RANGE)

    def close(self) -> None:
        """Let go of it; a mapping of it stays what it is. Safe to call twice."""
        self._close()
        _open_files.discard(self)

    def _set_direct(self, wanted: bool) -> bool:
        import fcntl  # not everywhere

        if not _DIRECT:
            return False
        flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags | _DIRECT if wanted else flags & ~_DIRECT)
        except OSError:
            return False
        return wanted


def room_bytes(place: Place) -> int:
    """Bytes that files of this process may still take in `place`: by its limit, and by the space free now."""
    taken = sum(file.reserved_bytes for file in list(_open_files) if file.place.folder == place.folder)
    found = os.statvfs(place.folder)
    return max(0, min(place.limit_bytes - taken, found.f_bavail * found.f_frsize - place.reserve_bytes))
