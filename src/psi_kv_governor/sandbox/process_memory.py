"""How much memory a process takes: proc_pid_status(5)."""

from __future__ import annotations

from pathlib import Path

import msgspec


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of one process at one moment."""

    resident_bytes: int
    anonymous_bytes: int
    swap_bytes: int
    peak_bytes: int
    """Most that was ever resident (VmHWM)."""


def glance(pid: int, root: Path = Path("/")) -> Sample | None:
    """By the kernel's running counts: 20 us, and no lock of the process is held.

    Each count may be behind by some pages for every core. None where the process is gone.
    """
    try:
        status = kilobytes(root / "proc" / str(pid) / "status")
        return Sample(
            resident_bytes=status["VmRSS"] * 1024,
            anonymous_bytes=status["RssAnon"] * 1024,
            swap_bytes=status["VmSwap"] * 1024,
            peak_bytes=status["VmHWM"] * 1024,
        )
    except (OSError, KeyError):  # a zombie has a status without memory
        return None


def kilobytes(path: Path) -> dict[str, int]:
    """The `Name:   number kB` lines of a file."""
    values = {}
    for line in path.read_text().splitlines():
        words = line.split()
        if len(words) == 3 and words[2] == "kB":
            values[words[0].rstrip(":")] = int(words[1])
    return values
