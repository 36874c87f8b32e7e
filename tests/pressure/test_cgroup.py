"""Finding the own cgroups in every layout."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from psi_kv_governor.pressure.cgroup import find_cgroups, parse_membership


def test_pure_v2(tree):
    tree.membership("0::/user.slice/user-1000.slice/session-2.scope")
    tree.mounts(("v2", "/", "/sys/fs/cgroup"))
    tree.v2("sys/fs/cgroup/user.slice/user-1000.slice/session-2.scope")
    own = find_cgroups(tree.root)
    top = tree.root / "sys/fs/cgroup"
    assert own.memory_v1 is None
    assert own.unified.lineage == (
        top / "user.slice/user-1000.slice/session-2.scope",
        top / "user.slice/user-1000.slice",
        top / "user.slice",
        top,
    )
    assert not own.unified.is_root


def test_hybrid_finds_each_hierarchy_in_its_own_place(tree):
    tree.membership("9:name=systemd:/", "4:memory:/app/one", "3:cpu,cpuacct:/", "0::/leaf")
    tree.mounts(
        ("v1 cpu", "/", "/sys/fs/cgroup/cpu,cpuacct"),
        ("v1", "/", "/sys/fs/cgroup/memory"),
        ("v2", "/", "/sys/fs/cgroup/unified"),
    )
    tree.v1("sys/fs/cgroup/memory/app/one")
    tree.v2("sys/fs/cgroup/unified/leaf")
    own = find_cgroups(tree.root)
    assert own.unified.folder == tree.root / "sys/fs/cgroup/unified/leaf"
    assert own.memory_v1.folder == tree.root / "sys/fs/cgroup/memory/app/one"
    assert own.memory_v1.version == 1


def test_v1_only(tree):
    tree.membership("4:memory:/", "0::/")
    tree.mounts(("v1", "/", "/sys/fs/cgroup/memory"))
    tree.v1("sys/fs/cgroup/memory")
    tree.write("sys/fs/cgroup/memory/release_agent", "\n")
    own = find_cgroups(tree.root)
    assert own.unified is None
    assert own.memory_v1.is_root


def test_the_root_cgroup_is_told_from_the_top_of_a_namespace(tree):
    tree.membership("0::/")
    tree.mounts(("v2", "/", "/sys/fs/cgroup"))
    tree.write("sys/fs/cgroup/cgroup.controllers", "memory\n")
    assert find_cgroups(tree.root).unified.is_root
    tree.v2("sys/fs/cgroup")
    assert not find_cgroups(tree.root).unified.is_root


def test_a_container_whose_mount_shows_only_its_own_part(tree):
    tree.membership("4:memory:/docker/abc/job")
    tree.mounts(("v1", "/docker/abc", "/sys/fs/cgroup/memory"))
    tree.v1("sys/fs/cgroup/memory/job")
    own = find_cgroups(tree.root).memory_v1
    assert own.folder == tree.root / "sys/fs/cgroup/memory/job"
    assert own.lineage[-1] == tree.root / "sys/fs/cgroup/memory"


def test_a_path_that_cannot_be_seen_falls_back_to_the_top_of_the_mount(tree):
    tree.mounts(("v2", "/", "/sys/fs/cgroup"))
    tree.v2("sys/fs/cgroup")
    for path in ("/docker/abc", "/../other", "/.."):
        tree.membership(f"0::{path}")
        assert find_cgroups(tree.root).unified.folder == tree.root / "sys/fs/cgroup"


def test_the_mount_that_shows_the_cgroup_wins_over_one_that_does_not(tree):
    tree.membership("0::/a")
    tree.mounts(("v2", "/b", "/mnt/other"), ("v2", "/", "/sys/fs/cgroup"))
    tree.v2("mnt/other")
    tree.v2("sys/fs/cgroup/a")
    assert find_cgroups(tree.root).unified.folder == tree.root / "sys/fs/cgroup/a"


def test_names_with_colons_spaces_and_backslashes(tree):
    tree.membership("0::/a:b/c d")
    tree.mounts(("v2", "/", "/sys/fs/my\\040cgroup\\134x"))
    tree.v2("sys/fs/my cgroup\\x/a:b/c d")
    assert find_cgroups(tree.root).unified.folder == tree.root / "sys/fs/my cgroup\\x/a:b/c d"


def test_a_removed_cgroup_is_none(tree):
    tree.membership("0::/gone (deleted)")
    tree.mounts(("v2", "/", "/sys/fs/cgroup"))
    assert find_cgroups(tree.root).unified is None


def test_no_proc_and_no_mount_give_none(tree, tmp_path):
    assert find_cgroups(tmp_path / "nothing") == (None, None)
    tree.membership("0::/", "4:memory:/")
    tree.mounts()
    assert find_cgroups(tree.root) == (None, None)


@given(st.text())
def test_any_text_is_survived(text):
    for path in parse_membership(text).values():
        assert path.startswith("/")


def test_this_process_is_found_in_its_cgroup():
    own = find_cgroups(Path("/"))
    for cgroup in own:
        if cgroup is not None:
            assert str_pid() in (cgroup.folder / "cgroup.procs").read_text().split()
    assert own.unified is not None or own.memory_v1 is not None


def str_pid() -> str:
    return str(Path("/proc/self").resolve().name)
