"""Whether what is written to a folder stays in memory, by what the machine counts: however it is named."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from pathlib import Path

from psi_kv_governor.residence.files import open_unlinked

_PROBES_BYTES = (4 << 20, 2 << 20, 4 << 20, 3 << 20, 2 << 20, 3 << 20, 4 << 20)
"""Sizes in no order: what others do at the same moment rises by just these several times by no chance."""
_PROOFS = 4
"""Of the probes, so many have to be seen as memory: beside others who fill and free 64 MiB without end 12 of
516 were by chance, so that three of six would be, once in 4,000 looks. Not all: on a disk in memory blocks
that were freed before are there already, and nothing rises when they are written again."""
_ERROR_BYTES = 1 << 20
"""Shared memory is counted to 125 pages (0.5 MiB) a processor: the writer's and a loop device's."""
_SWAPS, _BLOCKS = Path("/proc/swaps"), Path("/sys/block")

_found: dict[int, str] = {}
"""By st_dev, what was found to be memory, for the life of this process."""


class _SysInfo(ctypes.Structure):
    """struct sysinfo, <linux/sysinfo.h>: a call, so that it is there where /proc is hidden."""

    _fields_ = (
        ("uptime", ctypes.c_long),
        ("loads", ctypes.c_ulong * 3),
        ("total", ctypes.c_ulong),
        ("free", ctypes.c_ulong),
        ("shared", ctypes.c_ulong),
        ("buffers", ctypes.c_ulong),
        ("swap", ctypes.c_ulong * 2),
        ("processes", ctypes.c_ushort),
        ("padding", ctypes.c_ushort),
        ("high", ctypes.c_ulong * 2),
        ("unit", ctypes.c_uint),
        ("rest", ctypes.c_char * 256),
    )


def held_bytes() -> int:
    """Memory that files hold and no disk has: tmpfs (whatever lies on it), and zram that is no swap."""
    info = _SysInfo()
    try:
        known = ctypes.CDLL(None).sysinfo(ctypes.byref(info)) == 0
    except (AttributeError, OSError):
        known = False  # no Linux
    return (info.shared * info.unit if known else 0) + _in_zram()


def _in_zram() -> int:
    n_bytes = 0
    try:
        swaps = _SWAPS.read_text()
        for device in _BLOCKS.glob("zram*"):
            if f"/dev/{device.name} " not in swaps:
                n_bytes += int((device / "mm_stat").read_text().split()[2])  # mem_used_total
    except (OSError, ValueError, IndexError):
        return n_bytes
    return n_bytes


def memory_behind(folder: str) -> str:
    """Write up to 23 MB to our `folder`: why parking there returns nothing, or '' where it is no memory (or
    can't be found out). Raises nothing."""
    proofs: list[tuple[int, int]] = []
    with contextlib.ExitStack() as ending:  # all are there until the end: each has blocks of its own
        for done, n_bytes in enumerate(_PROBES_BYTES):
            if len(proofs) == _PROOFS or len(_PROBES_BYTES) - done < _PROOFS - len(proofs):
                break
            try:
                rise = _rise(folder, n_bytes, ending)
            except OSError:
                return ""
            if abs(rise - n_bytes) <= _ERROR_BYTES:
                proofs.append((n_bytes, rise))
    if len(proofs) < _PROOFS:
        return ""
    wrote, rose = (sum(numbers) / (1 << 20) for numbers in zip(*proofs, strict=True))
    why = f"{wrote:.0f} MiB written there took {rose:.0f} MiB of memory, so parking there returns nothing"
    with contextlib.suppress(OSError):
        _found[_device_of(folder)] = why
    return why


def _rise(folder: str, n_bytes: int, ending: contextlib.ExitStack) -> int:
    """By how much writing so much made it rise, less what others made it rise in as long a time just after.

    Whoever fills shared memory about as fast as the disk takes ours would otherwise be taken for it, whatever
    the size: a longer write gives him more time.
    """
    descriptor = open_unlinked(folder)
    ending.callback(os.close, descriptor)
    content = os.urandom(n_bytes)  # zram would compress anything else
    began_s, before = time.monotonic(), held_bytes()
    os.pwrite(descriptor, content, 0)
    os.fdatasync(descriptor)
    written_s, written = time.monotonic(), held_bytes()
    time.sleep(written_s - began_s)
    return written - before - (held_bytes() - written)


def found_before(folder: str) -> str:
    """Why `folder` is memory, where that was found out before; else ''. Raises OSError."""
    return _found.get(_device_of(folder), "")


def _device_of(folder: str) -> int:
    return Path(folder).stat().st_dev
