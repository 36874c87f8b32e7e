"""How much memory a process takes.

proc_pid_smaps(5) for `smaps_rollup` (exact, walks the page tables), proc_pid_status(5) for the peak and for
a look that costs nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from psi_kv_governor.errors import PsiKvError


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of one process at one moment."""

    resident_bytes: int
    anonymous_bytes: int
    swap_bytes: int
    peak_bytes: int
    """Most that was ever resident (VmHWM)."""


def sample(pid: int, root: Path = Path("/")) -> Sample | None:
    """Look at `pid`; None where it is gone. `root` stands in for the folder that holds /proc."""
    process = root / "proc" / str(pid)
    try:
        rollup = _kilobytes(process / "smaps_rollup")
        peak = _kilobytes(process / "status")["VmHWM"]
    except (OSError, KeyError):  # a zombie has a status without memory, and no mappings
        return None
    return Sample(
        resident_bytes=rollup.get("Rss", 0) * 1024,
        anonymous_bytes=rollup.get("Anonymous", 0) * 1024,
        swap_bytes=rollup.get("Swap", 0) * 1024,
        peak_bytes=peak * 1024,
    )


def glance(pid: int, root: Path = Path("/")) -> Sample | None:
    """The same from the kernel's running counts: 20 us, and no lock of the process is held.

    Each count may be behind by some pages for every core. None where the process is gone.
    """
    try:
        status = _kilobytes(root / "proc" / str(pid) / "status")
        return Sample(
            resident_bytes=status["VmRSS"] * 1024,
            anonymous_bytes=status["RssAnon"] * 1024,
            swap_bytes=status["VmSwap"] * 1024,
            peak_bytes=status["VmHWM"] * 1024,
        )
    except (OSError, KeyError):
        return None


def own_memory() -> Sample:
    """Of this process. Raises PsiKvError where the kernel does not tell."""
    look = sample(os.getpid())
    if look is None:
        raise PsiKvError("this kernel does not tell: /proc/self/smaps_rollup is needed (Linux 4.14)")
    return look


def _kilobytes(path: Path) -> dict[str, int]:
    """The `Name:   number kB` lines of a file."""
    values = {}
    for line in path.read_text().splitlines():
        words = line.split()
        if len(words) == 3 and words[2] == "kB":
            values[words[0].rstrip(":")] = int(words[1])
    return values
