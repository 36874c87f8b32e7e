"""What a folder lies on: real storage, or memory under another name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

_MEMORY_TYPES = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"})
_OCTAL = re.compile(r"\\([0-7]{3})")


class Mount(NamedTuple):
    """One line of `/proc/<pid>/mountinfo` (proc_pid_mountinfo(5))."""

    point: str
    fs_type: str
    device: str


def mounts(proc: Path = Path("/proc")) -> list[Mount]:
    """Every mount that this process sees, in mount order. Empty where `/proc` does not tell."""
    try:
        lines = (proc / "self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    return [mount for mount in map(_parse, lines) if mount is not None]


def _parse(line: str) -> Mount | None:
    # The optional fields before " - " vary in number, so each half is split on its own.
    left, separator, right = line.partition(" - ")
    left_fields, right_fields = left.split(), right.split()
    if not separator or len(left_fields) < 5 or len(right_fields) < 2:
        return None
    return Mount(_unescape(left_fields[4]), right_fields[0], _unescape(right_fields[1]))


def _unescape(field: str) -> str:
    """Blanks, tabs, line feeds and backslashes stand as three octal digits."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), field)


def mount_of(path: Path, proc: Path = Path("/proc")) -> Mount | None:
    """The mount that `path` lies on: the longest mount point above it, of equals the latest."""
    path = path.resolve()
    above = {str(path), *map(str, path.parents)}
    best: Mount | None = None
    for mount in mounts(proc):
        if mount.point in above and (best is None or len(mount.point) >= len(best.point)):
            best = mount
    return best


def memory_backed(path: Path, proc: Path = Path("/proc")) -> str:
    """Why writing to `path` would give no memory back; empty when it lies on storage."""
    mount = mount_of(path, proc)
    if mount is None:
        return ""
    if mount.fs_type in _MEMORY_TYPES:
        return f"{mount.point} is a {mount.fs_type}, which is memory itself"
    if mount.device.startswith("/dev/zram"):
        return f"{mount.point} lies on {mount.device}, which is compressed memory"
    return ""
