"""Headroom: the limit that bites first."""

from __future__ import annotations

from pathlib import Path

import pytest

from psi_kv_governor.pressure.cgroup import find_cgroups
from psi_kv_governor.pressure.headroom import HeadroomReader, machine_headroom

MIB = 1 << 20
NONE_V1 = "9223372036854771712"
NONE_V1_64K_PAGES = "9223372036854710272"


def read(tree):
    return HeadroomReader(find_cgroups(tree.root), tree.root).read()


def stat(inactive_mib: int, active_mib: int = 0, prefix: str = "") -> str:
    return f"anon 1\n{prefix}inactive_file {inactive_mib * MIB}\n{prefix}active_file {active_mib * MIB}"


@pytest.fixture
def v2(tree):
    tree.membership("0::/a/b")
    tree.mounts(("v2", "/", "/sys/fs/cgroup"))
    tree.v2("sys/fs/cgroup/a/b", max="max", high="max", current=str(100 * MIB), stat=stat(0))
    tree.v2("sys/fs/cgroup/a", max="max", high="max", current=str(300 * MIB), stat=stat(0))
    return tree


@pytest.fixture
def v1(tree):
    tree.membership("4:memory:/a/b")
    tree.mounts(("v1", "/", "/sys/fs/cgroup/memory"))
    use = {"usage_in_bytes": str(100 * MIB), "stat": stat(20, 30, "total_"), "use_hierarchy": "1"}
    tree.v1("sys/fs/cgroup/memory/a/b", limit_in_bytes=NONE_V1, **use)
    tree.v1("sys/fs/cgroup/memory/a", limit_in_bytes=NONE_V1_64K_PAGES, **use)
    return tree


def test_without_a_limit_it_is_the_machine(v2):
    assert read(v2)[:2] == (4_000_000 * 1024, 8_000_000 * 1024)


def test_max_minus_the_working_set(v2):
    v2.write("sys/fs/cgroup/a/b/memory.max", f"{150 * MIB}\n")
    v2.write("sys/fs/cgroup/a/b/memory.stat", stat(20, 30))
    room = read(v2)
    assert room[:2] == (70 * MIB, 150 * MIB)  # 100 used, of which 20 nobody uses again
    assert room.source == str(v2.root / "sys/fs/cgroup/a/b")


def test_high_bites_before_max(v2):
    v2.write("sys/fs/cgroup/a/b/memory.max", f"{150 * MIB}\n")
    v2.write("sys/fs/cgroup/a/b/memory.high", f"{120 * MIB}\n")
    assert read(v2)[:2] == (20 * MIB, 120 * MIB)


def test_the_ancestor_with_the_least_room_bites(v2):
    v2.write("sys/fs/cgroup/a/b/memory.max", f"{150 * MIB}\n")
    v2.write("sys/fs/cgroup/a/memory.max", f"{310 * MIB}\n")
    room = read(v2)
    assert room[:2] == (10 * MIB, 310 * MIB)
    assert room.source == str(v2.root / "sys/fs/cgroup/a")


def test_a_use_above_the_limit_is_no_room_and_never_less(v2):
    v2.write("sys/fs/cgroup/a/b/memory.high", f"{50 * MIB}\n")
    assert read(v2).headroom_bytes == 0


def test_the_machine_can_be_nearer_than_the_cgroup(v2):
    v2.write("sys/fs/cgroup/a/b/memory.max", f"{1 << 50}\n")
    assert read(v2).source == str(v2.root / "proc/meminfo")


def test_a_limit_that_vanishes_while_running_falls_back(v2):
    limit = v2.write("sys/fs/cgroup/a/b/memory.max", f"{150 * MIB}\n")
    reader = HeadroomReader(find_cgroups(v2.root), v2.root)
    assert reader.read().limit_bytes == 150 * MIB
    limit.unlink()
    assert reader.read().limit_bytes == 8_000_000 * 1024


@pytest.mark.parametrize("text", ["", "max", "-1", "12 34", "9" * 5000, "\xff"])
def test_a_limit_that_is_no_number_is_none(v2, text):
    v2.write("sys/fs/cgroup/a/b/memory.max", text)
    assert read(v2).source == str(v2.root / "proc/meminfo")


def test_v1_says_none_near_2_to_the_63(v1):
    assert read(v1).source == str(v1.root / "proc/meminfo")


def test_v1_limit_minus_the_working_set(v1):
    v1.write("sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", f"{150 * MIB}\n")
    assert read(v1)[:2] == (70 * MIB, 150 * MIB)


def test_v1_ancestors_count_only_where_they_are_charged(v1):
    v1.write("sys/fs/cgroup/memory/a/memory.limit_in_bytes", f"{110 * MIB}\n")
    assert read(v1)[:2] == (30 * MIB, 110 * MIB)
    v1.write("sys/fs/cgroup/memory/a/memory.use_hierarchy", "0\n")
    assert read(v1).source == str(v1.root / "proc/meminfo")


def test_nothing_to_read_gives_none(tree):
    (tree.root / "proc/meminfo").unlink()
    assert read(tree) is None


def test_a_meminfo_without_memavailable_gives_none(tree):
    assert machine_headroom(tree.write("proc/meminfo", "MemTotal: 10 kB\n")) is None


def test_this_machine_has_room():
    room = HeadroomReader(find_cgroups()).read()
    assert 0 <= room.headroom_bytes <= room.limit_bytes
    assert machine_headroom(Path("/proc/meminfo")).limit_bytes >= room.headroom_bytes
