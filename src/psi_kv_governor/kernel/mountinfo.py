"""The one parser of /proc/<pid>/mountinfo."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

_OCTAL = re.compile(r"\\([0-3][0-7]{2})")


class Mount(NamedTuple):
    """One line of `/proc/<pid>/mountinfo` (proc_pid_mountinfo(5))."""

    number: str
    """`major:minor` of the device, as st_dev has it; the major of filesystems without a block device is 0."""
    root: str
    """What of the filesystem is visible at `point`."""
    point: str
    options: frozenset[str]
    """Of this mount: `ro`, `noexec`, ..."""
    fs_type: str
    device: str
    """The filesystem's own word: `/dev/sda1`, `tmpfs`, `server:/export`."""
    details: dict[str, str]
    """Options of the filesystem (a flag without a value has ''): `ro`, `upperdir`, a cgroup's controllers."""


def parse_mounts(text: str) -> list[Mount]:
    """Every mount of `text`, in mount order; lines of another shape are left out."""
    return [mount for mount in map(_parse, text.splitlines()) if mount is not None]


def mounts(proc: Path = Path("/proc")) -> list[Mount]:
    """Every mount that this process sees, in mount order. Empty where `/proc` does not tell."""
    try:
        return parse_mounts((proc / "self/mountinfo").read_text(errors="surrogateescape"))
    except OSError:
        return []


def mount_of(path: Path, proc: Path = Path("/proc")) -> Mount | None:
    """The mount that `path` lies on: the longest mount point above it, of equals the latest."""
    path = path.resolve()
    above = {str(path), *map(str, path.parents)}
    best: Mount | None = None
    for mount in mounts(proc):
        if mount.point in above and (best is None or len(mount.point) >= len(best.point)):
            best = mount
    return best


def _parse(line: str) -> Mount | None:
    # The optional fields before " - " vary in number, so each half is split on its own.
    before, separator, after = line.partition(" - ")
    left, right = before.split(" "), after.split(" ")
    if not separator or len(left) < 6 or len(right) < 2:
        return None
    details = dict(_pair(option) for option in (right[2] if len(right) > 2 else "").split(",") if option)
    return Mount(
        number=left[2],
        root=_unescape(left[3]),
        point=_unescape(left[4]),
        options=frozenset(left[5].split(",")),
        fs_type=right[0],
        device=_unescape(right[1]),
        details=details,
    )


def _pair(option: str) -> tuple[str, str]:
    name, _, value = option.partition("=")
    return name, _unescape(value)


def _unescape(field: str) -> str:
    """Blanks, tabs, line feeds, commas in options and backslashes stand as three octal digits."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), field)
