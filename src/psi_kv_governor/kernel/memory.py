"""Calls on the memory of this process and on pages of files: libc through ctypes, nothing else.

Each raises OSError with the kernel's errno. Addresses are integers, sizes are bytes.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PAGE_BYTES = mmap.PAGESIZE

# By number: Windows, where this is imported too, has no such names.
READ_WRITE = 1 | 2  # PROT_READ | PROT_WRITE
ANONYMOUS = 0x02 | 0x20 | 0x4000  # MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
PRIVATE = 0x02 | 0x4000
SHARED = 0x01  # MAP_SHARED
FIXED = 0x10  # MAP_FIXED, <asm-generic/mman-common.h>

RANDOM = 1  # MADV_RANDOM: faults read no more than their page
DONTNEED = 4  # MADV_DONTNEED
DONTFORK = 10  # MADV_DONTFORK
POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14

ZERO_RANGE = 0x10  # FALLOC_FL_ZERO_RANGE, <linux/falloc.h>
PUNCH_HOLE = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE

_SYNC_START, _SYNC_AND_WAIT = 2, 1 | 2 | 4  # SYNC_FILE_RANGE_WRITE, and with both waits, <linux/fs.h>
_CACHESTAT = 451  # the same on every architecture (Linux 6.5)
_FS_IOC_SETFLAGS, _FS_IOC_GETFLAGS, _FS_NOCOW_FL = 0x40086602, 0x80086601, 0x00800000
_MAP_FAILED = ctypes.c_void_p(-1).value

_PRESENT, _SWAPPED, _OF_FILE = np.uint64(1 << 63), np.uint64(1 << 62), np.uint64(1 << 61)

Mask = npt.NDArray[np.bool_]
"""One truth a page."""


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    sizes = ctypes.c_void_p, ctypes.c_size_t
    libc.mmap.argtypes = (*sizes, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = sizes
    libc.madvise.argtypes = (*sizes, ctypes.c_int)
    libc.mincore.argtypes = (*sizes, ctypes.c_void_p)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return libc


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def map_memory(address: int, n_bytes: int, flags: int, descriptor: int = -1, offset: int = 0) -> int:
    """mmap(2), readable and writable; with FIXED it takes the place of what is at `address`."""
    got = _libc().mmap(address, n_bytes, READ_WRITE, flags, descriptor, offset)
    if got == _MAP_FAILED or got is None:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(got)


def unmap(address: int, n_bytes: int) -> None:
    """munmap(2); errors are of no use to anybody here."""
    _libc().munmap(address, n_bytes)


def advise(address: int, n_bytes: int, advice: int) -> None:
    """madvise(2)."""
    _checked(_libc().madvise(address, n_bytes, advice))


def allocate(descriptor: int, start: int, n_bytes: int, mode: int = 0) -> None:
    """fallocate(2) itself: libc's posix_fallocate would write zeros where the filesystem can't."""
    _checked(_libc().fallocate(descriptor, mode, start, n_bytes))


def keep_in_place(descriptor: int) -> None:
    """Ask btrfs to overwrite the blocks of this (still empty) file; elsewhere nothing happens.

    Copy on write takes new space for old pages, which can end in SIGBUS on a full disk.
    """
    import fcntl  # not everywhere

    flags = ctypes.c_long(0)
    try:
        fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, flags)
        flags.value |= _FS_NOCOW_FL
        fcntl.ioctl(descriptor, _FS_IOC_SETFLAGS, flags)
    except OSError:
        return


def write_back(descriptor: int, start: int, n_bytes: int, *, wait: bool = True) -> None:
    """Bring dirty pages of a file to the device; without `wait` only begin.

    sync_file_range(2) does so without the device's write barrier, which fdatasync costs; nobody needs
    these files after a crash. Raises OSError where the disk could not take them.
    """
    call = _sync_file_range()
    if call is None:
        if wait:
            os.fdatasync(descriptor)
        return
    _checked(call(descriptor, start, n_bytes, _SYNC_AND_WAIT if wait else _SYNC_START))


@functools.cache
def _sync_file_range() -> Any:
    try:
        call = _libc().sync_file_range
    except AttributeError:
        return None  # a libc without it
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call


def drop_file_pages(descriptor: int, start: int, n_bytes: int) -> None:
    """Have the kernel forget clean pages of a file, once nobody maps them any more."""
    os.posix_fadvise(descriptor, start, n_bytes, os.POSIX_FADV_DONTNEED)


def dirty_file_bytes(descriptor: int, start: int, n_bytes: int) -> int | None:
    """Bytes of a file that still have to be written (dirty or being written); None before Linux 6.5."""
    if not call_allowed("cachestat"):
        return None
    answer = (ctypes.c_uint64 * 5)()
    asked = (ctypes.c_uint64 * 2)(start, n_bytes)
    if _libc().syscall(_CACHESTAT, descriptor, asked, answer, 0) != 0:
        return None
    return int(answer[1] + answer[2]) * PAGE_BYTES


def in_memory(address: int, n_bytes: int) -> Mask | None:
    """By page, whether it is in memory (of a file also where this process has not mapped it), by mincore(2).

    None where the call is refused, or a seccomp filter would kill for it.
    """
    if not call_allowed("mincore"):
        return None
    pages = np.zeros(-(-n_bytes // PAGE_BYTES), dtype=np.uint8)
    if _libc().mincore(address, n_bytes, pages.ctypes.data) != 0:
        return None
    return (pages & 1).astype(np.bool_)


def page_table(address: int, n_bytes: int) -> tuple[Mask, Mask] | None:
    """By page: whether it is in this process's page table, and whether it is its own (not a file's).

    A page in swap is its own and not in the table. Of /proc/self/pagemap, for which no privilege is needed
    (bit 63: present, 62: swapped, 61: of a file or shared); None where it can't be read.
    """
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            raw = os.pread(file.fileno(), -(-n_bytes // PAGE_BYTES) * 8, address // PAGE_BYTES * 8)
    except OSError:
        return None
    if len(raw) != -(-n_bytes // PAGE_BYTES) * 8:
        return None
    entries = np.frombuffer(raw, dtype=np.uint64)
    present = (entries & _PRESENT) != 0
    return present, (present & ((entries & _OF_FILE) == 0)) | ((entries & _SWAPPED) != 0)


_TRY_S = 60
"""To start a Python takes ten seconds on a machine that is busy enough, and the answer is for good."""
_TRY = """
import ctypes, mmap
libc = ctypes.CDLL(None, use_errno=True)
page = mmap.mmap(-1, 4096)
where = ctypes.addressof(ctypes.c_char.from_buffer(page))
if {name!r} == "mincore":
    rc = libc.mincore(ctypes.c_void_p(where), ctypes.c_size_t(4096), (ctypes.c_ubyte * 1)())
else:
    rc = 0 if libc.syscall(451, -1, 0, 0, 0) == 0 or ctypes.get_errno() == 9 else 1
raise SystemExit(rc != 0)
"""


@functools.cache
def call_allowed(name: str, status: Path = Path("/proc/self/status")) -> bool:
    """Whether `mincore` or `cachestat` may be called here at all.

    A seccomp filter may kill for a call that it does not know, and there is no way of asking it. Under one
    (`Seccomp: 2`, as in every container) another process, which inherits the filter, tries first.
    """
    try:
        filtered = any(line.split() == ["Seccomp:", "2"] for line in status.read_text().splitlines())
    except OSError:
        filtered = True
    if not filtered:
        return True
    if not sys.executable:  # embedded
        return False
    try:
        tried = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRY.format(name=name)],
            check=False,
            capture_output=True,
            timeout=_TRY_S,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return tried.returncode == 0
