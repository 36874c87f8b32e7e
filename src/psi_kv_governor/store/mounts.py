"""What a folder lies on: real storage, or memory under another name."""

from __future__ import annotations

from pathlib import Path

from psi_kv_governor.residence import storage


def memory_backed(path: Path, proc: Path = Path("/proc")) -> str:
    """Why writing to `path` would give no memory back; empty when it lies on storage."""
    return storage.memory_backed(path, storage.Kernel(proc=proc))
