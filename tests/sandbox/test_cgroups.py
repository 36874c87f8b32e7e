"""Where a memory cgroup can be made, in the layouts that this machine does not have."""

from __future__ import annotations

from pathlib import Path

import pytest

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.sandbox.cgroups import Group, _take_back, find_place

V2 = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
V1 = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"


def write(root: Path, path: str, text: str = "") -> Path:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def v2_cgroup(
    root: Path, path: str, *, subtree: str = "", procs: str = "", controllers: str = "memory"
) -> Path:
    folder = f"sys/fs/cgroup/{path}"
    write(root, f"{folder}/cgroup.events", "populated 1\n")
    write(root, f"{folder}/cgroup.controllers", controllers)
    write(root, f"{folder}/cgroup.subtree_control", subtree)
    write(root, f"{folder}/cgroup.procs", procs)
    return root / folder


@pytest.fixture
def v2(tmp_path):
    write(tmp_path, "proc/self/mountinfo", V2)
    write(tmp_path, "proc/self/cgroup", "0::/user/app/scope\n")
    v2_cgroup(tmp_path, "")
    v2_cgroup(tmp_path, "user", subtree="cpu memory")
    v2_cgroup(tmp_path, "user/app", subtree="memory pids")
    v2_cgroup(tmp_path, "user/app/scope", procs="17\n")
    return tmp_path


def test_v2_takes_the_nearest_ancestor_that_hands_memory_down(v2):
    place = find_place(v2)
    folder = v2 / "sys/fs/cgroup/user/app"
    assert place == Group(2, folder, folder)


def test_v2_makes_an_ancestor_without_processes_hand_it_down(v2):
    write(v2, "sys/fs/cgroup/user/app/cgroup.subtree_control", "pids")
    place = find_place(v2)
    folder = v2 / "sys/fs/cgroup/user/app"
    assert place == Group(2, folder, folder, enable=True)


def test_v2_passes_an_ancestor_with_processes(v2):
    write(v2, "sys/fs/cgroup/user/app/cgroup.subtree_control", "pids")
    write(v2, "sys/fs/cgroup/user/app/cgroup.procs", "3\n")
    assert find_place(v2).memory == v2 / "sys/fs/cgroup/user"


def test_the_true_root_hands_down_even_with_processes(tmp_path):
    write(tmp_path, "proc/self/mountinfo", V2)
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    top = v2_cgroup(tmp_path, "", procs="1\n17\n")
    (top / "cgroup.events").unlink()
    assert find_place(tmp_path) == Group(2, top, top, enable=True)


def test_the_top_of_a_namespace_with_processes_does_not(tmp_path):
    write(tmp_path, "proc/self/mountinfo", V2)
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    v2_cgroup(tmp_path, "", procs="1\n17\n")
    with pytest.raises(PsiKvError, match="Delegate=yes"):
        find_place(tmp_path)


def test_v2_without_the_memory_controller_says_what_to_do(v2):
    for path in ("", "user", "user/app", "user/app/scope"):
        v2_cgroup(v2, path, controllers="pids", subtree="pids")
    with pytest.raises(PsiKvError, match="cgroup_enable=memory"):
        find_place(v2)


@pytest.mark.parametrize(("other", "left"), [("", "-memory"), ("another", "memory pids")])
def test_memory_is_no_longer_handed_down_once_no_other_group_can_need_it(v2, other, left):
    """Two sandboxes at a time: the first to go would take the limit of the second away."""
    parent = v2_cgroup(v2, "mine", subtree="memory pids")
    if other:
        (parent / other).mkdir()
    _take_back(Group(2, parent / "sandbox", parent / "sandbox", enable=True))
    assert (parent / "cgroup.subtree_control").read_text() == left


def test_hybrid_takes_both_hierarchies(tmp_path):
    unified = V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
    write(tmp_path, "proc/self/mountinfo", V1 + unified)
    write(tmp_path, "proc/self/cgroup", "4:memory:/job\n0::/\n")
    write(tmp_path, "sys/fs/cgroup/memory/job/cgroup.procs")
    write(tmp_path, "sys/fs/cgroup/unified/cgroup.procs")
    place = find_place(tmp_path)
    assert place.version == 1
    group = place.below("sandbox")
    assert group.folders == [
        tmp_path / "sys/fs/cgroup/memory/job/sandbox",
        tmp_path / "sys/fs/cgroup/unified/sandbox",
    ]
    assert group.unified == tmp_path / "sys/fs/cgroup/unified/sandbox"


def test_v1_alone_has_no_place_for_stall(tmp_path):
    write(tmp_path, "proc/self/mountinfo", V1)
    write(tmp_path, "proc/self/cgroup", "4:memory:/\n")
    write(tmp_path, "sys/fs/cgroup/memory/cgroup.procs")
    group = find_place(tmp_path).below("sandbox")
    assert group.unified is None
    assert group.folders == [tmp_path / "sys/fs/cgroup/memory/sandbox"]


def test_no_cgroups_at_all_say_what_to_do(tmp_path):
    with pytest.raises(PsiKvError, match="mount one"):
        find_place(tmp_path)
