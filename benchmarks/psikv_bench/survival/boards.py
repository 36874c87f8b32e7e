"""Surroundings that are a whole machine of their own, with another kernel, without PSI or swap."""

from __future__ import annotations

import os
import sys

from psi_kv_governor.sandbox.load import MIB
from psikv_bench.survival import whole
from psikv_bench.survival.around import Around

FILES_BYTES = 36 * MIB
"""Of libraries and interpreters, which both read from files: with less, they are read over and over. Found by
trying: beside its neighbour plain llama.cpp is killed with 30, and lives or stands still with 36."""


def _machine(around: Around, memory_bytes: int, *before: str) -> None:
    """On a machine of its own, with a neighbour of 100 MiB at 100 MB/s."""
    around.ramp(100, 100.0)
    around.beside, around.neighbour = around.neighbour or [], None
    environ = {
        "PATH": os.environ["PATH"], "HOME": "/mnt", "TMPDIR": "/mnt", "OPENBLAS_NUM_THREADS": "1",
        "PSIKV_NATIVE_DIR": whole.native_folder(around.folder.parent),
        "PYTHONPATH": ":".join(path for path in sys.path if path), "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    around.settings = {"place_reserve_bytes": 0}
    around.wrap = lambda argv: whole.command(
        argv, around.folder, memory_bytes=memory_bytes, environ=environ, before=before
    )


def board(around: Around) -> None:
    """A board without PSI, swap or cgroups, that lacks half of the cache beside a neighbour of 100 MB/s."""
    _machine(around, around.short_bytes + FILES_BYTES + whole.KERNEL_BYTES)


def board_with_room(around: Around) -> None:
    """The same board, on which both programs just fit."""
    _machine(around, around.need_bytes + 110 * MIB + FILES_BYTES + whole.KERNEL_BYTES)


def memory_high(around: Around) -> None:
    """A cgroup of v2 whose memory.high (no limit beside it) lacks half of the cache, without PSI or swap."""
    high = around.short_bytes + FILES_BYTES
    _machine(
        around,
        high + 256 * MIB,
        "echo +memory > /sys/fs/cgroup/cgroup.subtree_control",
        "mkdir /sys/fs/cgroup/box",
        f"echo {high} > /sys/fs/cgroup/box/memory.high",
        "echo $$ > /sys/fs/cgroup/box/cgroup.procs",
    )


def earlyoom(around: Around) -> None:
    """Debian's earlyoom at 10 % on a machine without PSI or swap: the neighbour leaves less."""
    program = whole.earlyoom(around.folder.parent)
    memory_bytes = around.need_bytes + 134 * MIB + FILES_BYTES + whole.KERNEL_BYTES
    _machine(around, memory_bytes, f"{program} -m 10 -r 0 > /run/earlyoom.log 2>&1 &", "sleep 1")
