"""Every level in one reading, out of fake trees for what this machine does not have."""

from __future__ import annotations

import pytest

from psi_kv_governor.pressure.cgroup import find_cgroups
from psi_kv_governor.pressure.discovery import discover
from psi_kv_governor.pressure.headroom import HeadroomReader
from psi_kv_governor.pressure.kernel_file import PAGE_BYTES
from psi_kv_governor.pressure.reading import MACHINE

MIB = 1 << 20


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def pod(tree):
    """A container of 512 MiB in a slice with `memory.high`, on a machine of 8 GB."""
    tree.membership("0::/slice/pod")
    tree.mounts(("v2", "/", "/sys/fs/cgroup"))
    tree.v2("sys/fs/cgroup/slice/pod", max=str(512 * MIB), current=str(100 * MIB), stat="anon 1")
    tree.v2("sys/fs/cgroup/slice", max="max", high=str(700 * MIB), current=str(650 * MIB), stat="anon 1")
    tree.machine_psi()
    return tree


def reader(tree, clock=None, **more) -> HeadroomReader:
    return HeadroomReader(find_cgroups(tree.root), tree.root, clock or Clock(), environ={}, **more)


def by_name(tree, levels) -> dict:
    return {level.name.removeprefix(str(tree.root / "sys/fs/cgroup")): level for level in levels}


def test_a_reading_holds_every_level_with_its_limit(pod):
    source = discover(pod.root, {}).source
    levels = by_name(pod, source.read().levels)
    assert list(levels) == ["/slice/pod", "/slice", MACHINE]
    assert [level.headroom_bytes for level in levels.values()] == [412 * MIB, 50 * MIB, 4_000_000 * 1024]
    assert [level.limit for level in levels.values()] == ["memory.max", "memory.high", "MemAvailable"]
    source.close()


def test_each_level_has_the_stall_of_its_own_file(pod, monkeypatch):
    source = discover(pod.root, {}).source
    times = iter([10.0, 11.0])
    monkeypatch.setattr(source, "_clock", lambda: next(times))
    source.read()
    for folder, stall_us in (("slice/pod", 100_000), ("slice", 300_000)):
        pod.v2(f"sys/fs/cgroup/{folder}", some_us=stall_us)
    pod.machine_psi(600_000)
    levels = by_name(pod, source.read().levels)
    assert [round(level.some, 3) for level in levels.values()] == [0.1, 0.3, 0.6]
    source.close()


def test_a_psi_file_of_another_level_that_goes_away_loses_nothing_else(pod):
    source = discover(pod.root, {}).source
    source.read()
    path = pod.root / "sys/fs/cgroup/slice/memory.pressure"
    path.write_text("")
    path.unlink()
    assert by_name(pod, source.read().levels)["/slice"].some is None
    source.close()


def test_a_cgroup_without_a_limit_tells_its_stall_all_the_same(pod):
    pod.write("sys/fs/cgroup/slice/pod/memory.max", "max\n")
    source = discover(pod.root, {}).source
    own = by_name(pod, source.read().levels)["/slice/pod"]
    assert (own.headroom_bytes, own.limit_bytes) == (None, None)
    source.close()


def test_a_limit_bites_while_it_is_met_and_not_when_one_below_it_is(pod):
    clock = Clock()
    rooms = reader(pod, clock)
    events = "sys/fs/cgroup/{}/memory.events.local"
    for folder in ("slice/pod", "slice"):
        pod.write(events.format(folder), "low 0\nhigh 0\nmax 7\noom 0\n")
    assert by_name(pod, rooms.levels())["/slice"].bites is None  # nothing to compare with
    clock.now_s += 0.1
    pod.write(events.format("slice/pod"), "low 0\nhigh 0\nmax 8\noom 0\n")
    levels = by_name(pod, rooms.levels())
    assert (levels["/slice/pod"].bites, levels["/slice"].bites) == (True, False)
    clock.now_s += 2.0
    assert by_name(pod, rooms.levels())["/slice/pod"].bites is False
    rooms.close()


def test_the_machine_s_own_limit_bites_while_the_kernel_reclaims_for_it(pod):
    clock = Clock()
    rooms = reader(pod, clock)
    pod.write("proc/vmstat", "pgscan_kswapd 5\npgscan_direct 1\nworkingset_refault_file 100\n")
    rooms.levels()
    clock.now_s += 1.0
    assert by_name(pod, rooms.levels())[MACHINE].bites is False
    pod.write("proc/vmstat", "pgscan_kswapd 5\npgscan_direct 9\nworkingset_refault_file 600\n")
    clock.now_s += 1.0
    level = by_name(pod, rooms.levels())[MACHINE]
    assert (level.bites, level.refault_bytes_per_s) == (True, 500 * PAGE_BYTES)
    rooms.close()


@pytest.mark.parametrize(
    ("mapped", "dirty", "own", "others"), [(60, 0, 0, 60), (60, 10, 0, 50), (60, 0, 50, 10), (60, 0, 90, 0)]
)
def test_what_others_have_mapped_and_is_clean_is_told_apart(pod, mapped, dirty, own, others):
    lines = {"inactive_file": 80, "file_mapped": mapped, "file_dirty": dirty}
    text = "".join(f"{name} {mib * MIB}\n" for name, mib in lines.items())
    pod.write("sys/fs/cgroup/slice/pod/memory.stat", text)
    level = reader(pod).levels(own * MIB)[0]
    assert (level.headroom_bytes, level.mapped_bytes) == ((412 + 20) * MIB, others * MIB)


def test_how_far_the_count_may_be_off_goes_with_the_processors(pod):
    """256 KiB a processor: on 128 of them 32 MiB, more than 4 % of half a GiB."""
    levels = reader(pod, processors=128).levels()
    assert [level.grain_bytes for level in levels] == [32 * MIB, 32 * MIB, 0]


# -- the lines of others -----------------------------------------------------------------------------------

MEMINFO = (
    "MemTotal: 8000000 kB\nMemFree: 300000 kB\nMemAvailable: 1000000 kB\nInactive(file): 200000 kB\n"
    "SwapTotal: {0} kB\nSwapFree: {1} kB\n"
)
KIB = 1024


def running(tree, comm: str, *arguments: str) -> None:
    tree.write("proc/77/comm", f"{comm}\n")
    tree.write("proc/77/cmdline", "\0".join((f"/usr/bin/{comm}", *arguments, "")))


def lines(tree, environ=None, swap=(0, 0)) -> dict:
    tree.write("proc/meminfo", MEMINFO.format(*swap))
    rooms = HeadroomReader(find_cgroups(tree.root), tree.root, Clock(), environ=environ or {})
    return {level.name: level for level in rooms.levels() if level.name != MACHINE and level.name[0] != "/"}


@pytest.mark.parametrize(
    ("arguments", "swap", "left_kib"),
    [
        ((), (0, 0), 200_000),  # 10 % of 8,000,000
        (("-m", "5"), (0, 0), 600_000),
        (("-m5,2",), (0, 0), 600_000),
        (("-M", "400000,200000"), (0, 0), 600_000),
        (("-m", "20", "-M", "400000"), (0, 0), 600_000),  # the lower of the two
        ((), (1_000_000, 500_000), 200_000 + 400_000),  # it waits for the swap as well
        (("-s", "100"), (1_000_000, 500_000), 200_000),
        (("-m", "much"), (0, 0), 200_000),
    ],
)
def test_earlyoom_kills_at_its_own_line(tree, arguments, swap, left_kib):
    running(tree, "earlyoom", *arguments)
    assert lines(tree, swap=swap)["earlyoom"].headroom_bytes == left_kib * KIB


def test_systemd_oomd_kills_where_swap_runs_out(tree):
    running(tree, "systemd-oomd")
    assert lines(tree) == {}  # without swap it looks at pressure alone
    assert lines(tree, swap=(1_000_000, 100_000))["systemd-oomd"].headroom_bytes == 200_000 * KIB


@pytest.mark.parametrize(
    ("arguments", "left_kib"),
    [((), 500_000 - 102_400), (("--eviction-hard=nodefs.available<10%,memory.available<5%",), 100_000)],
)
def test_kubelet_evicts_at_its_threshold(tree, arguments, left_kib):
    running(tree, "kubelet", *arguments)
    assert lines(tree)["kubelet"].headroom_bytes == left_kib * KIB


def test_in_a_pod_the_kubelet_is_not_to_be_seen_and_evicts_all_the_same(tree):
    assert "memory.available<100Mi" in lines(tree, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"})["kubelet"].limit


def test_ray_kills_at_a_share_of_the_container(pod):
    running(pod, "raylet")
    assert lines(pod)["ray"].headroom_bytes == pytest.approx((412 - 0.05 * 512) * MIB, abs=1)
    assert lines(pod, {"RAY_memory_usage_threshold": "0.5"})["ray"].headroom_bytes == 156 * MIB
    assert lines(pod, {"RAY_memory_monitor_refresh_ms": "0"}) == {}


def test_what_ray_was_started_with_counts_and_not_our_own_environment(pod):
    running(pod, "raylet")
    pod.write(
        "proc/77/environ", "HOME=/root\0RAY_memory_usage_threshold=0.5\0RAY_min_memory_free_bytes=1048576"
    )
    about = lines(pod, {"RAY_memory_usage_threshold": "0.9", "RAY_memory_monitor_refresh_ms": "0"})["ray"]
    assert about.headroom_bytes == 411 * MIB  # half, or 1 MiB: what is less has to stay free
    pod.write("proc/77/environ", "RAY_memory_monitor_refresh_ms=0\0")
    assert lines(pod) == {}


SAYS = "I 7 7] (raylet) monitor.cc:53: ThresholdMemoryMonitor initialized with usage threshold at "


@pytest.mark.parametrize(
    ("said", "headroom_bytes"),
    [
        # A container's: 384 of 512 MiB. A machine's: its own memory, and not the limit that we have.
        (
            f"{SAYS}{384 * MIB} bytes (75.0% of system memory), total system memory bytes: {512 * MIB}",
            284 * MIB,
        ),
        (
            f"{SAYS}7372800000 bytes (90.0% ...), total system memory bytes: 8192000000",
            1_024_000_000 - 819_200_000,
        ),
        ("I 7 7] (raylet) multi.cc:70: ThresholdMemoryMonitor disabled. Specify `RAY_...` > 0", None),
        ("nothing of it", (412 - 256) * MIB),
    ],
)
def test_what_ray_says_in_its_log_goes_before_the_environment(pod, said, headroom_bytes):
    """A cluster's --system-config is in no environment of a node."""
    log = pod.root / "raylet.out"
    log.write_text(f"I 7 7] (raylet) main.cc:283: Setting cluster ID\n{said}\n")
    running(pod, "raylet", f"--stdout_filepath={log}")
    pod.write("proc/77/environ", "RAY_memory_usage_threshold=0.5\0")
    found = lines(pod)
    assert (found["ray"].headroom_bytes if found else None) == headroom_bytes


def test_a_machine_where_nothing_kills_has_no_such_line(tree):
    running(tree, "bash")
    assert lines(tree) == {}


# -- why there is nothing to read --------------------------------------------------------------------------


def why(tree, name: str) -> str:
    found = discover(tree.root, {})
    if found.source is not None:
        found.source.close()
    return next(candidate.why for candidate in found.considered if candidate.name.endswith(name))


def test_a_hidden_proc_pressure_is_not_taken_for_a_kernel_without_psi(tree):
    proc = "24 23 0:22 / /proc rw,relatime shared:5 - proc proc rw,subset=pid"
    tree.write("proc/self/mountinfo", proc + "\n")
    assert "ProcSubset=pid" in why(tree, "proc/pressure/memory")


def test_a_kernel_whose_cgroups_keep_psi_has_it_hidden(pod):
    (pod.root / "proc/pressure/memory").unlink()
    (pod.root / "proc/pressure").rmdir()
    assert "hides /proc/pressure" in why(pod, "proc/pressure/memory")


def test_the_root_cgroup_is_not_taken_for_a_machine_without_the_memory_controller(tree):
    tree.membership("0::/")
    tree.mounts(("v2", "/", "/sys/fs/cgroup"))
    tree.write("sys/fs/cgroup/cgroup.controllers", "cpu memory\n")
    assert "the root, which has no limit" in why(tree, "memory.events of the own cgroup")


@pytest.mark.parametrize(
    ("controllers", "remedy"), [("cpu pids\n", "cgroup_enable=memory"), ("cpu memory\n", "+memory")]
)
def test_a_cgroup_without_the_memory_controller_says_how_to_get_it(tree, controllers, remedy):
    tree.membership("0::/app")
    tree.mounts(("v2", "/", "/sys/fs/cgroup"))
    tree.v2("sys/fs/cgroup/app")
    tree.write("sys/fs/cgroup/cgroup.controllers", controllers)
    assert remedy in why(tree, "memory.events of the own cgroup")
