"""Fake trees of /proc and /sys for the layouts that this machine does not have."""

from __future__ import annotations

from pathlib import Path

import pytest
from sensing_help import Watched, stays_failed

PSI = "some avg10=0.00 avg60=0.00 avg300=0.00 total={}\nfull avg10=0.00 avg60=0.00 avg300=0.00 total={}\n"
MEMINFO = "MemTotal:        8000000 kB\nMemFree:         1000000 kB\nMemAvailable:    4000000 kB\n"
MOUNTS = {
    "v2": "31 23 0:28 {root} {point} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate",
    "v1": "35 31 0:32 {root} {point} rw,relatime - cgroup cgroup rw,memory",
    "v1 cpu": "36 31 0:33 {root} {point} rw,relatime - cgroup cgroup rw,cpu,cpuacct",
}


class Tree:
    """A folder that stands in for `/`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", MEMINFO)

    def write(self, path: str, text: str) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def membership(self, *lines: str) -> None:
        self.write("proc/self/cgroup", "\n".join(lines) + "\n")

    def mounts(self, *kinds: tuple[str, str, str]) -> None:
        """Mounts as (kind, root, point)."""
        other = "22 27 0:21 / /proc rw,relatime - proc proc rw"
        lines = [MOUNTS[kind].format(root=root, point=point) for kind, root, point in kinds]
        self.write("proc/self/mountinfo", "\n".join((other, *lines)) + "\n")

    def v2(self, folder: str, *, some_us: int | None = 0, **files: str) -> None:
        """A v2 cgroup below the root; `some_us` None leaves `memory.pressure` out."""
        self.write(f"{folder}/cgroup.events", "populated 1\nfrozen 0\n")
        if some_us is not None:
            self.write(f"{folder}/memory.pressure", PSI.format(some_us, 0))
        self._memory(folder, files)

    def v1(self, folder: str, **files: str) -> None:
        """A v1 memory cgroup."""
        self.write(f"{folder}/cgroup.procs", "")
        self._memory(folder, files)

    def machine_psi(self, some_us: int = 0) -> Path:
        return self.write("proc/pressure/memory", PSI.format(some_us, 0))

    def _memory(self, folder: str, files: dict[str, str]) -> None:
        for name, text in files.items():
            self.write(f"{folder}/memory.{name}", text + "\n")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.fixture
def v2(tree):
    """A machine with PSI everywhere, whose files a test can break."""
    tree.membership("0::/app")
    tree.mounts(("v2", "/", "/sys/fs/cgroup"))
    tree.v2("sys/fs/cgroup/app", max="400000000", current="100000000")
    tree.machine_psi()
    return tree


@pytest.fixture
def watched(v2, monkeypatch):
    stays_failed(monkeypatch)
    made = Watched(monkeypatch, v2.root, {})
    assert made.sensor.name == str(v2.root / "sys/fs/cgroup/app/memory.pressure")
    yield made
    made.sensor.close()
