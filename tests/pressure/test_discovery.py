"""The ladder of sources: which one is taken, and what is said about the others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from sensing_help import open_descriptors

from psi_kv_governor.pressure import discover


@pytest.fixture
def v2(tree):
    tree.membership("0::/app")
    tree.mounts(("v2", "/", "/sys/fs/cgroup"))
    tree.v2("sys/fs/cgroup/app")
    tree.machine_psi()
    return tree


def look(tree):
    discovery = discover(tree.root, {})
    if discovery.source is not None:
        discovery.source.read()
        discovery.source.close()
    return discovery


def usable(discovery):
    """Of systemd's watch, the own cgroup, the machine, the cgroup's events, headroom, and psutil."""
    return [candidate.usable for candidate in discovery.considered]


def test_the_own_cgroup_comes_first(v2):
    discovery = look(v2)
    assert discovery.source.name == str(v2.root / "sys/fs/cgroup/app/memory.pressure")
    assert usable(discovery) == [False, True, True, False, True, False]
    assert discovery.rank == 1


def test_a_hybrid_layout_takes_the_own_v2_leaf_and_the_v1_limit(tree):
    tree.membership("4:memory:/job", "0::/leaf")
    tree.mounts(("v1", "/", "/sys/fs/cgroup/memory"), ("v2", "/", "/sys/fs/cgroup/unified"))
    tree.v1("sys/fs/cgroup/memory/job", limit_in_bytes="1000000", usage_in_bytes="400000")
    tree.v2("sys/fs/cgroup/unified/leaf")
    discovery = discover(tree.root, {})
    assert discovery.source.name.endswith("unified/leaf/memory.pressure")
    assert discovery.source.read().levels[0].headroom_bytes == 600_000
    discovery.source.close()


def test_the_root_cgroup_is_passed_over_for_the_machine(tree):
    tree.membership("0::/")
    tree.mounts(("v2", "/", "/sys/fs/cgroup"))
    tree.write("sys/fs/cgroup/memory.pressure", "some\n")
    tree.machine_psi()
    discovery = look(tree)
    assert discovery.source.name == str(tree.root / "proc/pressure/memory")
    assert "the whole machine's" in discovery.considered[1].why


def test_a_kernel_without_psi_says_how_to_turn_it_on(v2):
    (v2.root / "sys/fs/cgroup/app/memory.pressure").unlink()
    (v2.root / "proc/pressure/memory").unlink()
    discovery = look(v2)
    assert discovery.source.name.startswith("headroom alone")
    assert usable(discovery) == [False, False, False, False, True, False]
    assert all("psi=1" in candidate.why for candidate in discovery.considered[1:3])


def test_psi_switched_off_for_the_cgroup_is_told_apart(v2):
    (v2.root / "sys/fs/cgroup/app/memory.pressure").unlink()
    v2.write("sys/fs/cgroup/app/cgroup.pressure", "0\n")
    assert "write 1 to" in look(v2).considered[1].why


def test_a_psi_file_of_another_shape_is_not_used(v2):
    v2.write("sys/fs/cgroup/app/memory.pressure", "nonsense\n")
    discovery = look(v2)
    assert "not a line of a PSI file" in discovery.considered[1].why
    assert discovery.source.name == str(v2.root / "proc/pressure/memory")


def test_a_machine_without_cgroups_uses_the_whole_machine(tree):
    tree.machine_psi()
    discovery = look(tree)
    assert discovery.source.name == str(tree.root / "proc/pressure/memory")
    assert "no cgroup v2" in discovery.considered[1].why


def test_what_failed_lately_is_left_out(v2):
    first = look(v2).source.name
    discovery = discover(v2.root, {}, avoid=frozenset({first}))
    assert discovery.source.name == str(v2.root / "proc/pressure/memory")
    assert discovery.rank == 2
    discovery.source.close()


def test_a_search_for_something_better_leaves_the_rest_alone(v2):
    discovery = discover(v2.root, {}, rungs=2)
    assert discovery.rank == 1
    discovery.source.close()
    assert discover(v2.root, {}, rungs=1).source is None


def test_the_file_that_the_service_manager_names_comes_first(v2):
    v2.v2("sys/fs/cgroup/service", some_us=7)
    path = v2.root / "sys/fs/cgroup/service/memory.pressure"
    discovery = discover(v2.root, {"MEMORY_PRESSURE_WATCH": str(path)})
    assert (discovery.source.name, discovery.rank) == (str(path), 0)
    discovery.source.close()


def test_where_the_service_manager_turned_it_off_nothing_is_read(v2):
    discovery = discover(v2.root, {"MEMORY_PRESSURE_WATCH": "/dev/null"})
    assert discovery.source is None
    assert "by hand only" in discovery.off
    assert [candidate.usable for candidate in discovery.considered] == [False]


@pytest.fixture
def without_psi(v2):
    """A kernel with PSI off and cgroups that count how often they met their limit."""
    (v2.root / "sys/fs/cgroup/app/memory.pressure").unlink()
    (v2.root / "proc/pressure/memory").unlink()
    v2.write("sys/fs/cgroup/app/memory.events", "low 0\nhigh 3\nmax 0\noom 0\noom_kill 0\n")
    return v2


def test_without_psi_the_events_of_the_cgroup_are_counted(without_psi):
    discovery = look(without_psi)
    assert discovery.source.name == str(without_psi.root / "sys/fs/cgroup/app/memory.events")
    assert usable(discovery) == [False, False, False, True, True, False]


def test_memory_events_of_another_shape_are_not_used(without_psi):
    without_psi.write("sys/fs/cgroup/app/memory.events", "<html>\n")
    discovery = look(without_psi)
    assert "not a list of memory events" in discovery.considered[3].why
    assert discovery.source.name.startswith("headroom alone")


def test_without_proc_psutil_tells(tmp_path):
    source = discover(tmp_path, {}).source
    reading = source.read()
    assert source.name == "headroom alone (psutil)"
    assert 0 < reading.headroom_bytes <= reading.limit_bytes
    assert (reading.some, reading.full, reading.interval_s) == (0.0, 0.0, 0.0)
    source.close()


def test_a_machine_that_tells_nothing_has_no_source(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    before = open_descriptors()
    discovery = discover(tmp_path, {})
    assert discovery.source is None
    assert open_descriptors() == before
    assert not any(candidate.usable for candidate in discovery.considered)


def test_every_reason_is_one_line(v2, tmp_path):
    for discovery in (look(v2), look(type(v2)(tmp_path / "none")), discover()):
        for candidate in discovery.considered:
            assert candidate.why
            assert "\n" not in candidate.why


def test_only_the_source_keeps_a_descriptor(v2):
    before = open_descriptors()
    source = discover(v2.root, {}).source
    source.read()
    assert open_descriptors() > before
    source.close()
    source.close()
    assert open_descriptors() == before


@pytest.mark.skipif(
    not Path("/proc/pressure/memory").exists(), reason="this kernel keeps no PSI: boot with psi=1"
)
def test_this_machine_has_a_source_with_stall():
    source = discover().source
    source.read()
    assert source.name.endswith(("memory.pressure", "/proc/pressure/memory"))
    source.close()
