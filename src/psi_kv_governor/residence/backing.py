"""Whether a cache is born in a file or in memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from psi_kv_governor.residence.place import Place
from psi_kv_governor.residence.storage import HERE, Kernel

SLOW_BYTES_PER_S = 32 << 20
"""Below this speed no cache is born in a file: the kernel makes whoever dirties pages wait for the disk, and
a prefill of 250 tokens a second dirties so much with an 8B model's 128 KiB a token."""

_IN_PLACE = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "overlay"})
"""Filesystems on which an allocated page can always be written again, so that a full disk never ends in
SIGBUS (btrfs: with the no-copy-on-write flag, which our files get)."""

Backing = Literal["file", "memory"]


def choose_backing(
    setting: Literal["auto", "file", "memory"],
    place: Place | None,
    swap_present: bool,
    cgroup_has_swap: bool,
    write_bytes_per_s: float | None = None,
    *,
    n_bytes: int = 0,
) -> tuple[Backing, str]:
    """Whether a cache of `n_bytes` is born in a file of `place`, and why, in one clause.

    By itself it is where the machine or the own cgroup has no swap: there the kernel would kill, and with a
    file it can write the cache out instead.
    """
    if setting == "memory":
        return "memory", "asked for"
    if why := _why_not_file(place, n_bytes):
        return "memory", why
    assert place is not None
    if setting == "file":
        return "file", "asked for"
    if swap_present and cgroup_has_swap:
        return "memory", "there is swap, so the kernel has somewhere to put it"
    speed = place.write_bytes_per_s if write_bytes_per_s is None else write_bytes_per_s
    if speed < SLOW_BYTES_PER_S:
        return "memory", f"the disk takes {speed / 1e6:.0f} MB/s, and decoding would wait for it"
    where = "the cgroup may use no swap" if swap_present else "the machine has no swap"
    return "file", f"{where}, and with a file the kernel writes the cache out before it kills"


def _why_not_file(place: Place | None, n_bytes: int) -> str:
    if place is None:
        return "there is no folder that could hold it"
    if place.fs_type and place.fs_type not in _IN_PLACE:
        return f"{place.fs_type} writes pages to a new place, so that a full disk could kill"
    if n_bytes > place.free_bytes:
        asked, free = n_bytes >> 20, place.free_bytes >> 20
        return f"it takes {asked} MiB, and {place.folder} has {free} MiB above the reserve"
    return ""


def swap_state(kernel: Kernel = HERE, cgroups: Callable[[], list[Path]] | None = None) -> tuple[bool, bool]:
    """Whether the machine has swap, and whether every cgroup level up from ours may use it."""
    try:
        swaps = len((kernel.proc / "swaps").read_text().splitlines()) > 1
    except OSError:
        swaps = False
    return swaps, all(map(_may_swap, (cgroups or _own_cgroups)()))


def _own_cgroups() -> list[Path]:
    """The folders of the own memory cgroup and those above it."""
    from psi_kv_governor.pressure.cgroup import find_cgroups

    return [level for own in find_cgroups() if own is not None for level in own.lineage]


def _may_swap(cgroup: Path) -> bool:
    def number(name: str) -> int | None:
        try:
            text = (cgroup / name).read_text().strip()
        except OSError:
            return None
        return int(text) if re.fullmatch(r"\d+", text) else None

    if number("memory.swap.max") == 0 or number("memory.swappiness") == 0:
        return False
    limit, with_swap = number("memory.limit_in_bytes"), number("memory.memsw.limit_in_bytes")
    # In v1 an unlimited cgroup says the same enormous number for both.
    return limit is None or with_swap is None or with_swap > limit or limit >= 1 << 60
