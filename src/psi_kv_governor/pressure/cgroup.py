"""Which cgroups this process is in, and where in the file system they can be read.

Knows cgroup v2, v1, and the hybrid of both, with and without a cgroup namespace (cgroups(7), proc(5)).
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import NamedTuple

from psi_kv_governor.kernel.mountinfo import Mount, mounts
from psi_kv_governor.pressure.kernel_file import KernelFile

_DELETED = " (deleted)"  # the kernel appends it to the path of a removed v2 cgroup


class Cgroup(NamedTuple):
    """One cgroup of this process, as a folder that can be read."""

    version: int
    """1 or 2."""
    folder: Path
    mount: Path
    """Where its hierarchy is mounted; `folder` is it or lies below it."""

    @property
    def lineage(self) -> tuple[Path, ...]:
        """The cgroup itself and all its ancestors that can be seen, nearest first."""
        above = [self.folder, *self.folder.parents]
        return tuple(above[: above.index(self.mount) + 1])

    @property
    def is_root(self) -> bool:
        """Whether it is the root of the whole machine's hierarchy, which has no limits.

        The top of a cgroup namespace looks like a root from inside, yet has `cgroup.events` (v2) as every
        cgroup but the true root does. In v1 the true root alone has `release_agent`.
        """
        if self.version == 2:
            return not (self.folder / "cgroup.events").exists()
        return (self.folder / "release_agent").exists()


class OwnCgroups(NamedTuple):
    """The cgroups that matter here; None where this machine has no such hierarchy or hides it."""

    unified: Cgroup | None
    """The v2 cgroup: its `memory.pressure`, and its limits where v2 has the memory controller."""
    memory_v1: Cgroup | None
    """The v1 cgroup with the memory controller: its limits."""

    @property
    def unified_lineage(self) -> tuple[Path, ...]:
        """The folders of the v2 cgroup and those above it."""
        return () if self.unified is None else self.unified.lineage


def parse_membership(text: str) -> dict[str, str]:
    """Path of the cgroup by controller from /proc/self/cgroup; the v2 cgroup is under the key ''."""
    paths: dict[str, str] = {}
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if not colon or not path.startswith("/") or path.endswith(_DELETED):
            continue
        if number == "0" and not controllers:
            paths[""] = path
        else:
            paths.update(dict.fromkeys(filter(None, controllers.split(",")), path))
    return paths


def find_cgroups(root: Path = Path("/")) -> OwnCgroups:
    """The cgroups of this process; `root` stands in for the folder that holds /proc and /sys."""
    try:
        paths = parse_membership((root / "proc/self/cgroup").read_text(errors="surrogateescape"))
    except OSError:
        return OwnCgroups(None, None)
    found = mounts(root / "proc")
    unified = [mount for mount in found if mount.fs_type == "cgroup2"]
    memory_v1 = [mount for mount in found if mount.fs_type == "cgroup" and "memory" in mount.details]
    return OwnCgroups(
        _visible(root, 2, paths.get(""), unified),
        _visible(root, 1, paths.get("memory"), memory_v1),
    )


class Membership:
    """Notices that this process was moved to another cgroup: /proc/self/cgroup reads differently."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._file = KernelFile(root / "proc/self/cgroup")
        self._at_first = self._file.read()

    def changed(self) -> bool:
        """Whether it was moved since. What can't be read now is no sign of it."""
        now = self._file.read()
        return now is not None and now != self._at_first

    def close(self) -> None:
        """Give the descriptor back. Safe to call twice."""
        self._file.close()


def _visible(root: Path, version: int, path: str | None, shown: list[Mount]) -> Cgroup | None:
    """The first mount that shows the cgroup `path`; failing that, the top of the first mount there is.

    In a container, `path` may be the host's name for a folder that the container sees as the top of its
    mount: that top is then the nearest thing to the own cgroup that can be read (its limits are right).
    """
    if path is None:
        return None
    for mount in shown:
        relative = _below(path, mount.root)
        if relative is not None:
            point = _under(root, mount.point)
            if (point / relative).is_dir():
                return Cgroup(version, point / relative, point)
    for mount in shown:
        point = _under(root, mount.point)
        if point.is_dir():
            return Cgroup(version, point, point)
    return None


def _below(path: str, top: str) -> PurePosixPath | None:
    """`path` relative to `top`; None where it is not below it (`..` leads out of a cgroup namespace)."""
    if ".." in PurePosixPath(path).parts or ".." in PurePosixPath(top).parts:
        return None
    try:
        return PurePosixPath(path).relative_to(top)
    except ValueError:
        return None


def _under(root: Path, absolute: str) -> Path:
    return root / absolute.lstrip("/")
