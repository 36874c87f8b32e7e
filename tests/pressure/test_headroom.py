"""Headroom: the limit that bites first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from psi_kv_governor.pressure.cgroup import find_cgroups
from psi_kv_governor.pressure.headroom import HeadroomReader, machine_headroom
from psi_kv_governor.pressure.reading import Level
from psi_kv_governor.residence.storage import memory_backed
from psi_kv_governor.sandbox.sandbox import Sandbox
from waiting import PATIENCE_S

MIB = 1 << 20
NONE_V1 = "9223372036854771712"
NONE_V1_64K_PAGES = "9223372036854710272"


class Clock:
    """Stands still, or goes on by `tick_s` at each look."""

    now_s, tick_s = 0.0, 0.0

    def __call__(self) -> float:
        self.now_s += self.tick_s
        return self.now_s


def read(tree):
    return HeadroomReader(find_cgroups(tree.root), tree.root).read()


def stat(inactive_mib: int, active_mib: int = 0, prefix: str = "") -> str:
    return f"anon 1\n{prefix}inactive_file {inactive_mib * MIB}\n{prefix}active_file {active_mib * MIB}\n"


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
    assert room[:2] == (85 * MIB, 150 * MIB)  # 100 used: 20 nobody uses again, and 15 of 30 may be missed
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
    clock = Clock()
    reader = HeadroomReader(find_cgroups(v2.root), v2.root, clock)
    assert reader.read().limit_bytes == 150 * MIB
    limit.write_text("")  # what a file answers that is on its way out
    limit.unlink()
    assert reader.read().limit_bytes == 8_000_000 * 1024
    v2.write("sys/fs/cgroup/a/b/memory.max", f"{200 * MIB}\n")
    clock.now_s += 1.0
    assert reader.read().limit_bytes == 200 * MIB
    reader.close()
    reader.close()
    assert reader.read().limit_bytes == 200 * MIB  # it opens again
    reader.close()


def test_a_limit_that_is_set_while_running_counts_within_a_second(v2):
    clock = Clock()
    reader = HeadroomReader(find_cgroups(v2.root), v2.root, clock)
    assert reader.read().source == str(v2.root / "proc/meminfo")
    v2.write("sys/fs/cgroup/a/memory.max", f"{310 * MIB}\n")
    clock.now_s += 0.5
    assert reader.read().source == str(v2.root / "proc/meminfo")
    clock.now_s += 0.5
    assert reader.read()[:2] == (10 * MIB, 310 * MIB)
    reader.close()


def test_a_limit_that_is_changed_while_running_counts_at_once(v2):
    v2.write("sys/fs/cgroup/a/b/memory.max", f"{300 * MIB}\n")
    reader = HeadroomReader(find_cgroups(v2.root), v2.root)
    for limit_mib in (150, 120, 400):
        v2.write("sys/fs/cgroup/a/b/memory.max", f"{limit_mib * MIB}\n")
        assert reader.read()[:2] == ((limit_mib - 100) * MIB, limit_mib * MIB)
    reader.close()


@pytest.mark.parametrize(
    ("active", "mapped", "shared", "free"),
    [
        (0, 0, 0, 60),
        (0, 50, 0, 10),  # the model's weights before the kernel ever looked for something to drop
        (50, 50, 0, 60),  # and after it did
        (30, 50, 0, 40),
        (0, 50, 50, 60),  # shared memory is mapped too, and no file
        (0, 90, 0, 0),
        (60, 0, 0, 90),  # of what is active and not mapped, half
        (100, 50, 0, 85),
    ],
)
def test_file_pages_that_are_mapped_are_not_free(v2, active, mapped, shared, free):
    v2.write("sys/fs/cgroup/a/b/memory.max", f"{150 * MIB}\n")
    lines = {"inactive_file": 60, "active_file": active, "file_mapped": mapped, "shmem": shared}
    v2.write("sys/fs/cgroup/a/b/memory.stat", "".join(f"{name} {mib * MIB}\n" for name, mib in lines.items()))
    assert read(v2)[:2] == ((50 + free) * MIB, 150 * MIB)


def test_what_is_mapped_on_the_machine_is_not_free(tree):
    text = "MemTotal: 800 kB\nMemAvailable: 500 kB\nMapped: 300 kB\nShmem: 100 kB\n"
    assert machine_headroom(tree.write("proc/meminfo", text))[:2] == (300 * 1024, 800 * 1024)
    text = text.replace("300", "900")
    assert machine_headroom(tree.write("proc/meminfo", text)).headroom_bytes == 0


def test_a_slow_memory_stat_is_read_less_often(v2):
    """It may take two hundredths of the time: after a read of 1 ms, not before 50 ms later."""
    v2.write("sys/fs/cgroup/a/b/memory.max", f"{150 * MIB}\n")
    clock = Clock()
    reader = HeadroomReader(find_cgroups(v2.root), v2.root, clock)
    clock.tick_s = 0.001
    assert reader.read().headroom_bytes == 50 * MIB
    v2.write("sys/fs/cgroup/a/b/memory.stat", stat(20))
    v2.write("sys/fs/cgroup/a/b/memory.current", f"{110 * MIB}\n")
    clock.now_s += 0.040
    assert reader.read().headroom_bytes == 40 * MIB  # the use is read every time
    clock.now_s += 0.010
    assert reader.read().headroom_bytes == 60 * MIB
    reader.close()


def test_who_stood_still_while_reading_goes_by_what_it_read_for_a_second_at_the_most(v2):
    """Two seconds in the middle of a read of memory.stat are not its slowness, and no reason to go by it for
    a hundred seconds: under pressure is when a process stands still."""
    v2.write("sys/fs/cgroup/a/b/memory.max", f"{150 * MIB}\n")
    clock = Clock()
    reader = HeadroomReader(find_cgroups(v2.root), v2.root, clock)
    clock.tick_s = 2.0
    reader.read()
    clock.tick_s = 0.0
    v2.write("sys/fs/cgroup/a/b/memory.stat", stat(20))
    clock.now_s += 1.0
    assert reader.read().headroom_bytes == 70 * MIB
    reader.close()


@pytest.mark.parametrize("text", ["", "max", "-1", "12 34", "9" * 5000, "\xff"])
def test_a_limit_that_is_no_number_is_none(v2, text):
    v2.write("sys/fs/cgroup/a/b/memory.max", text)
    assert read(v2).source == str(v2.root / "proc/meminfo")


def test_v1_says_none_near_2_to_the_63(v1):
    assert read(v1).source == str(v1.root / "proc/meminfo")


def test_v1_limit_minus_the_working_set(v1):
    v1.write("sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", f"{150 * MIB}\n")
    assert read(v1)[:2] == (85 * MIB, 150 * MIB)


def test_v1_ancestors_count_only_where_they_are_charged(v1):
    v1.write("sys/fs/cgroup/memory/a/memory.limit_in_bytes", f"{110 * MIB}\n")
    assert read(v1)[:2] == (45 * MIB, 110 * MIB)
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


MAPS = """
import mmap, os, sys
path, read = sys.argv[1], sys.stdin.readline
with open(path, "wb") as file:
    file.write(bytes(40 << 20))
    os.fsync(file.fileno())
print("written", flush=True), read()
with open(path, "rb") as file:
    weights = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
for _ in range(3):
    for page in range(0, len(weights), mmap.PAGESIZE):
        weights[page]
print("mapped", flush=True), read()
"""


@pytest.mark.cgroup
def test_the_kernel_s_own_count_of_weights_that_are_mapped(tmp_path):
    """Written, they are room; mapped and used they are not, although the kernel still has them inactive."""
    if memory_backed(tmp_path):
        pytest.skip("the folder of the tests is in memory: set --basetemp to one on a disk")

    def look(own_mapped_bytes: int = 0) -> Level:
        """By a reader of its own: one that is kept leaves memory.stat alone for a while after a slow read."""
        reader = HeadroomReader(pen.own_cgroups())
        level = reader.levels(own_mapped_bytes)[0]
        reader.close()
        return level

    with Sandbox(128 * MIB) as pen:
        command = [sys.executable, "-c", MAPS, str(tmp_path / "weights")]
        child = pen.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"written\n"
        before = look()
        child.stdin.write(b"\n")
        child.stdin.flush()
        assert child.stdout.readline() == b"mapped\n"
        after, own = look(), look(own_mapped_bytes=40 * MIB)
        child.communicate(b"\n", timeout=PATIENCE_S)
    assert before.limit_bytes == after.limit_bytes == 128 * MIB
    assert before.headroom_bytes - after.headroom_bytes > 35 * MIB
    # They are another's, so the kernel can drop them: no fall, and room as long as nobody misses them.
    assert after.mapped_bytes - before.mapped_bytes > 35 * MIB
    room = [level.headroom_bytes + level.mapped_bytes for level in (before, after)]
    assert abs(room[0] - room[1]) < 5 * MIB
    assert own.mapped_bytes < 5 * MIB  # and these would be the own weights
