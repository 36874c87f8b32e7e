"""A swap device of one's own in compressed memory.

Kernel: Documentation/admin-guide/blockdev/zram.rst; swapon(2).
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from pathlib import Path

from psi_kv_governor.errors import PsiKvError

CONTROL = Path("/sys/class/zram-control")

_SWAP_FLAG_PREFER = 0x8000
_PRIORITY = 0x7FFF
"""The highest there is: the sandbox swaps here, and not to a disk of the machine. Other processes do not
come here in the meantime, since only the sandbox is short of memory."""
_HEADER_AT = 1024
_MAGIC = b"SWAPSPACE2"
_BUSY_TIMEOUT_S = 5.0

_libc = ctypes.CDLL(None, use_errno=True)


def why_not() -> str:
    """Why no device can be made here, and what to do; empty where one can."""
    if not CONTROL.exists():
        return "this kernel has no zram: load it with `modprobe zram`"
    if not os.access(CONTROL / "hot_add", os.R_OK):
        return "making a zram device takes root: run it as root"
    return ""


def add_swap(n_bytes: int) -> int:
    """Make a device of `n_bytes` (a multiple of the page size) and swap on it. Gives its number.

    Raises PsiKvError, with nothing left behind, when the kernel refuses.
    """
    try:
        number = int((CONTROL / "hot_add").read_text())
    except OSError as error:
        raise PsiKvError(f"cannot make a zram device: {error.strerror}; run it as root") from error
    try:
        Path(f"/sys/block/zram{number}/disksize").write_text(str(n_bytes))
        with _device(number).open("r+b", buffering=0) as file:
            file.write(_header(n_bytes))
        if _libc.swapon(bytes(_device(number)), _SWAP_FLAG_PREFER | _PRIORITY):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    except OSError as error:
        remove_swap(number)
        raise PsiKvError(f"cannot swap on {_device(number)}: {error.strerror}; run it as root") from error
    return number


def remove_swap(number: int) -> str:
    """Stop swapping on the device and remove it. Gives why it is left; empty when it is gone."""
    deadline_s = time.monotonic() + _BUSY_TIMEOUT_S
    _libc.swapoff(bytes(_device(number)))  # refused where it was no swap yet
    try:
        while Path(f"/sys/block/zram{number}").exists():
            try:
                (CONTROL / "hot_remove").write_text(str(number))
            except OSError:  # busy: whoever watches block devices has just opened it to look
                if time.monotonic() >= deadline_s:
                    raise
                time.sleep(0.05)
    except OSError as error:
        return f"{_device(number)}: {error.strerror}"
    return ""


def _device(number: int) -> Path:
    return Path(f"/dev/zram{number}")


def _header(n_bytes: int) -> bytes:
    """First page of a swap area: version 1, its last page, no bad pages (include/linux/swap.h)."""
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    page = bytearray(page_bytes)
    struct.pack_into("=III", page, _HEADER_AT, 1, n_bytes // page_bytes - 1, 0)
    page[-len(_MAGIC) :] = _MAGIC
    return bytes(page)
