"""What a process sees of its own memory, and what a cgroup ever took.

proc_pid_smaps(5) for `smaps_rollup`: exact, since it walks the page tables.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.sandbox.cgroups import Group
from psi_kv_governor.sandbox.process_memory import Sample, kilobytes

GOVERNOR_THREAD = "psi-kv-governor"


def sample(pid: int, root: Path = Path("/")) -> Sample | None:
    """Look at `pid`; None where it is gone. `root` stands in for the folder that holds /proc."""
    process = root / "proc" / str(pid)
    try:
        rollup = kilobytes(process / "smaps_rollup")
        peak = kilobytes(process / "status")["VmHWM"]
    except (OSError, KeyError):  # a zombie has a status without memory, and no mappings
        return None
    return Sample(
        resident_bytes=rollup.get("Rss", 0) * 1024,
        anonymous_bytes=rollup.get("Anonymous", 0) * 1024,
        swap_bytes=rollup.get("Swap", 0) * 1024,
        peak_bytes=peak * 1024,
    )


def peak_bytes(group: Group) -> int:
    """Most memory ever charged to a cgroup; 0 before Linux 5.19 with v2."""
    files = (group.memory / name for name in ("memory.peak", "memory.max_usage_in_bytes"))
    return next((int(file.read_text()) for file in files if file.exists()), 0)


def own_memory() -> Sample:
    """Of this process. Raises PsiKvError where the kernel does not tell."""
    look = sample(os.getpid())
    if look is None:
        raise PsiKvError("this kernel does not tell: /proc/self/smaps_rollup is needed (Linux 4.14)")
    return look


def governor_cpu_s() -> float:
    """Processor time of the governor's thread so far, by the kernel's own account; 0 without one.

    /proc/[pid]/task/[tid]/schedstat counts nanoseconds; `stat` counts ticks of 10 ms.
    """
    for thread in threading.enumerate():
        if thread.name == GOVERNOR_THREAD:
            text = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text()
            return int(text.split()[0]) / 1e9
    return 0.0
