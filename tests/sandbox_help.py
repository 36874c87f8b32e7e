"""What the tests of the benches share."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType


def sandboxes_of(pid: int) -> list[Path]:
    """Folders of the sandboxes that process `pid` has made."""
    folders = os.walk("/sys/fs/cgroup")  # unlike glob it passes over what vanishes meanwhile
    return [
        Path(top, name)
        for top, names, _ in folders
        for name in names
        if name.startswith(f"psi-kv-sandbox-{pid}-")
    ]


def pids_in(sandboxes: list[Path]) -> set[int]:
    """Processes in `sandboxes`; none in one that is gone by now."""
    found: set[int] = set()
    for sandbox in sandboxes:
        with contextlib.suppress(OSError):
            found.update(map(int, (sandbox / "cgroup.procs").read_text().split()))
    return found


def started(module: ModuleType, *arguments: str) -> subprocess.Popen[bytes]:
    """`python -m module ARGUMENTS`, listened to."""
    return subprocess.Popen(
        [sys.executable, "-m", module.__name__, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def children_of(pid: int) -> Iterator[tuple[str, str]]:
    """Name and command line of each child of process `pid`."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            # A name may be any bytes, and is cut within a character too.
            told = (process / "stat").read_text(errors="replace")
            name, _, rest = told.partition("(")[2].rpartition(")")
            if int(rest.split()[1]) == pid:
                yield name, (process / "cmdline").read_text(errors="replace").replace("\0", " ")


def swap_devices_of(pid: int) -> set[str]:
    """What the sandboxes of process `pid` swap to, by the names of those who own them."""
    names = [name for name, _ in children_of(pid) if name.startswith("psi-kv-zram")]
    return {f"/dev/{name.removeprefix('psi-kv-')}" for name in names}


def still_swapped_to(devices: set[str]) -> set[str]:
    """Those of `devices` that the machine swaps to."""
    return devices & {line.split()[0] for line in Path("/proc/swaps").read_text().splitlines()[1:]}


def leftovers() -> list[str]:
    """Pens and neighbours that this process started and that are still there."""
    found = [str(path) for path in sandboxes_of(os.getpid())]
    return found + [words for _, words in children_of(os.getpid()) if "psi_kv_governor.sandbox" in words]
