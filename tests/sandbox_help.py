"""What the tests of the benches share."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
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


def swap_devices() -> set[str]:
    """What the machine swaps to."""
    return {line.split()[0] for line in Path("/proc/swaps").read_text().splitlines()[1:]}


def leftovers() -> list[str]:
    """Pens and neighbours that this process started and that are still there."""
    found = [str(path) for path in sandboxes_of(os.getpid())]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == os.getpid() and b"psi_kv_governor.sandbox" in b" ".join(words):
            found.append(b" ".join(words).decode())
    return found
