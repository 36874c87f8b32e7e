"""What a process that holds a model sees of itself."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from psi_kv_governor.sandbox.llm import Cells
from psi_kv_governor.sandbox.messages import Looked
from psi_kv_governor.sandbox.process_memory import own_memory

GOVERNOR_THREAD = "psi-kv-governor"


def looked(cells: Cells, turns: int) -> Looked:
    """This process now; `cells` and `turns` are of its model's governor."""
    return Looked(
        memory=own_memory(),
        live_cells=cells.live,
        masked_cells=cells.masked,
        lost_cells=cells.lost,
        governor_cpu_s=_thread_cpu_s(),
        turns=turns,
        descriptors=sum(1 for _ in Path("/proc/self/fd").iterdir()),
        threads=threading.active_count(),
    )


def _thread_cpu_s() -> float:
    """Processor time of the governor's thread so far, by the kernel's own account; 0 without one.

    /proc/[pid]/task/[tid]/schedstat counts nanoseconds; `stat` counts ticks of 10 ms.
    """
    for thread in threading.enumerate():
        if thread.name == GOVERNOR_THREAD:
            text = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text()
            return int(text.split()[0]) / 1e9
    return 0.0


def drop_file_cache(path: str | Path, *, written: bool = False) -> None:
    """Forget the file's pages, so that they are read, and charged, by whoever needs them next (page cache
    belongs to the cgroup that touches it first). Pages that another process has mapped stay where they are,
    and so do dirty ones, unless it was `written` here: then it is synced before."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if written:
            os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
