"""Where a memory cgroup of one's own can be made, making it, reading it, and removing it.

cgroup v2: Documentation/admin-guide/cgroup-v2.rst (delegation, no internal processes);
v1: Documentation/admin-guide/cgroup-v1/memory.rst.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.pressure.cgroup import Cgroup, find_cgroups

_REMOVE_TIMEOUT_S = 30.0
"""A process that waits for its pages to come back from swap dies only after that."""


@dataclass(frozen=True)
class Group:
    """Folders of a memory cgroup, or to make it in: one in v2, up to two (limit and stall) in v1."""

    version: int
    """Of the hierarchy with the memory controller: 1 or 2."""
    memory: Path
    """The folder with the limit."""
    unified: Path | None
    """The v2 folder with `memory.pressure`; None where no v2 hierarchy can be written to."""
    enable: bool = False
    """Whether the parent has to pass its memory controller down first (v2)."""

    def below(self, name: str) -> Group:
        """The group `name` in these folders."""
        return replace(self, memory=self.memory / name, unified=self.unified and self.unified / name)

    @property
    def folders(self) -> list[Path]:
        """Every folder of the group. A process is inside when it is in all of them."""
        return list(dict.fromkeys(filter(None, (self.memory, self.unified))))

    def usage_bytes(self) -> int:
        """Memory charged to the group now. Raises OSError when the group is gone."""
        return int(self._file("memory.current", "memory.usage_in_bytes").read_text())

    def oom_kills(self) -> int:
        """Processes of the group that the kernel killed for want of memory."""
        text = self._file("memory.events", "memory.oom_control").read_text()
        return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill "))

    def pids(self) -> list[int]:
        """Processes in any folder of the group, as far as this process may see them."""
        found: set[int] = set()
        for folder in self.folders:
            try:
                found.update(map(int, (folder / "cgroup.procs").read_text().split()))
            except FileNotFoundError:
                continue
        return sorted(found - {0})  # 0 stands for processes outside this pid namespace

    def _file(self, v2: str, v1: str) -> Path:
        return self.memory / (v2 if self.version == 2 else v1)


def find_place(root: Path = Path("/")) -> Group:
    """Below the own cgroup (so that its limits hold on), or below the nearest delegated ancestor.

    Raises PsiKvError, saying what to do, where this user may make no memory cgroup.
    """
    own = find_cgroups(root)
    if own.memory_v1 is None and own.unified is None:
        raise PsiKvError("no cgroup hierarchy is mounted here: mount one at /sys/fs/cgroup")
    if own.memory_v1 is None:
        assert own.unified is not None, "one of them is there"
        return _place_v2(own.unified)
    memory, unified = own.memory_v1.folder, own.unified and own.unified.folder
    if not _may_make(memory):
        raise PsiKvError(f"no right to make a memory cgroup in {memory}: run it as root")
    return Group(1, memory, unified if unified is not None and _may_make(unified) else None)


def _place_v2(own: Cgroup) -> Group:
    """The nearest ancestor that is ours and hands its memory controller down, or can be made to.

    A v2 cgroup with processes of its own cannot (save the root), so the own one hardly ever does.
    """
    if "memory" not in _words(own.mount / "cgroup.controllers"):
        raise PsiKvError(
            "this kernel's memory cgroups are switched off: boot with cgroup_enable=memory "
            "(on a Raspberry Pi: in cmdline.txt)"
        )
    for folder in own.lineage:
        if not _may_make(folder):
            break
        if "memory" in _words(folder / "cgroup.subtree_control"):
            return Group(2, folder, folder)
        able = "memory" in _words(folder / "cgroup.controllers")
        is_root = Cgroup(2, folder, own.mount).is_root
        if able and (is_root or not _words(folder / "cgroup.procs")):
            return Group(2, folder, folder, enable=True)
    raise PsiKvError(
        "no memory cgroup is delegated to this user: run it as root (not in a container), "
        "or start it with `systemd-run --user --scope -p Delegate=yes`"
    )


def make_group(group: Group, limit_bytes: int, swap_bytes: int) -> None:
    """Make the folders and set the limits; `swap_bytes` 0 keeps the group out of swap.

    Raises PsiKvError, with nothing left behind, when the kernel refuses.
    """
    try:
        if group.enable:
            (group.memory.parent / "cgroup.subtree_control").write_text("+memory")
        for folder in group.folders:
            folder.mkdir()
        set_limit(group, limit_bytes, swap_bytes)
    except OSError as error:
        remove_group(group)
        raise PsiKvError(
            f"cannot make the memory cgroup {group.memory}: {error.strerror} ({error.filename}); "
            "run it as root, or with a limit that the parent allows"
        ) from error


def set_limit(group: Group, limit_bytes: int, swap_bytes: int) -> None:
    """Limit what may be charged to the group; `swap_bytes` 0 keeps it out of swap. Raises OSError."""
    if group.version == 2:
        (group.memory / "memory.max").write_text(str(limit_bytes))
        _write_if_there(group.memory / "memory.swap.max", swap_bytes)
        return
    (group.memory / "memory.limit_in_bytes").write_text(str(limit_bytes))
    _write_if_there(group.memory / "memory.memsw.limit_in_bytes", limit_bytes + swap_bytes)
    if swap_bytes == 0:
        # Where swap is not accounted, this is the one thing that keeps the group out of the machine's swap.
        _write_if_there(group.memory / "memory.swappiness", 0)


def _write_if_there(path: Path, value: int) -> None:
    """Kernels without swap, or that do not account it, lack the file and need no limit on it."""
    if path.exists():
        path.write_text(str(value))


def remove_group(group: Group) -> str:
    """Kill what runs in the group and remove it. Gives what is left and why; empty when nothing is.

    Only processes that the group itself lists are killed. A process may enter between the look and the
    removal, so this repeats until the folders are gone.
    """
    deadline_s = time.monotonic() + _REMOVE_TIMEOUT_S
    left: list[str] = []
    while time.monotonic() < deadline_s:
        _kill(group)
        left = [f"{folder}: {why}" for folder in group.folders if (why := _rmdir(folder))]
        if not left:
            _take_back(group)
            return ""
        time.sleep(0.02)
    return "; ".join(left)


def _kill(group: Group) -> None:
    if group.unified is not None:
        with contextlib.suppress(OSError):
            (group.unified / "cgroup.kill").write_text("1")  # at once, forks included (Linux 5.14)
    for pid in group.pids():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _rmdir(folder: Path) -> str:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return ""
    except OSError as error:
        return os.strerror(error.errno or errno.EIO)
    return ""


def _take_back(group: Group) -> None:
    """Undo `+memory`, but not beside another group: the kernel would take its limits away without a word.

    It refuses only where that one hands memory down itself (seen with Linux 6.1).
    """
    parent = group.memory.parent
    with contextlib.suppress(OSError):
        if group.enable and not any(entry.is_dir() for entry in parent.iterdir()):
            (parent / "cgroup.subtree_control").write_text("-memory")


def _may_make(folder: Path) -> bool:
    """Whether this user may make groups in `folder` and move processes there."""
    return os.access(folder, os.W_OK) and os.access(folder / "cgroup.procs", os.W_OK)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
