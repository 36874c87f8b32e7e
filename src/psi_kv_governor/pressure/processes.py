"""How large the governed processes are: what they take themselves, nobody else took."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from psi_kv_governor.pressure.kernel_file import PAGE_BYTES, KernelFile

Processes = Callable[[], Iterable[int]]
"""Gives the ids of the processes that hold the caches of one governor, as they are now."""


def only_this() -> tuple[int]:
    """The process that runs this: it holds its caches itself."""
    return (os.getpid(),)


def holders(caches: Mapping[int, tuple[str, int]]) -> Processes:
    """The processes of `caches` (name and process id by number) as these are then; this one while there are
    none."""
    return lambda: {pid for _, pid in list(caches.values())} or only_this()


class ProcessSizes:
    """Reads statm of processes; the files of those that were asked for last stay open."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._files: dict[int, KernelFile] = {}

    def read(self, pid: int) -> tuple[int, int] | None:
        """Resident bytes, and what of them is file pages and shared memory: the second and third number of
        statm, in pages (proc(5)). None where it is gone."""
        if pid not in self._files:
            self._files[pid] = KernelFile(self._root / f"proc/{pid}/statm")
        words = (self._files[pid].read() or b"").split()
        if len(words) < 3 or not (words[1].isdigit() and words[2].isdigit()):
            self._files.pop(pid).close()
            return None
        return int(words[1]) * PAGE_BYTES, int(words[2]) * PAGE_BYTES

    def close(self) -> None:
        """Give the descriptors back. Safe to call twice."""
        for file in self._files.values():
            file.close()
        self._files = {}
