"""A memory limit that stands for a container."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path


class Limit:
    """A memory cgroup of its own (v1 or v2), without swap."""

    def __init__(self, n_bytes: int) -> None:
        unified = Path("/sys/fs/cgroup/cgroup.controllers")
        self._v2 = unified.is_file() and "memory" in unified.read_text()
        root = Path("/sys/fs/cgroup") if self._v2 else Path("/sys/fs/cgroup/memory")
        self._folder = root / f"psi-kv-server-bench-{os.getpid()}"
        self._folder.mkdir()
        if self._v2:
            (self._folder / "memory.max").write_text(str(n_bytes))
            (self._folder / "memory.swap.max").write_text("0")
        else:
            (self._folder / "memory.limit_in_bytes").write_text(str(n_bytes))
            with contextlib.suppress(OSError):
                (self._folder / "memory.memsw.limit_in_bytes").write_text(str(n_bytes))
        self._usage = self._folder / ("memory.current" if self._v2 else "memory.usage_in_bytes")

    def enter(self) -> None:
        """In the child, before it becomes the server."""
        (self._folder / "cgroup.procs").write_text(str(os.getpid()))

    def usage_bytes(self) -> int:
        return int(self._usage.read_text())

    def kills(self) -> int:
        file = self._folder / ("memory.events" if self._v2 else "memory.oom_control")
        fields = dict(line.split() for line in file.read_text().splitlines())
        return int(fields.get("oom_kill", 0))

    def close(self) -> None:
        for pid in (self._folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                self._folder.rmdir()
                return
            except OSError:
                time.sleep(0.1)
