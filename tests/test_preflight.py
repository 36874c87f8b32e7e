"""Every check says what it found, and what to do where something is missing; none ever raises."""

import gc
import sys
from pathlib import Path

import pytest

from psi_kv_governor import doctor, llama_doctor, preflight
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.llama import loader
from psi_kv_governor.errors import EngineError
from psi_kv_governor.isolated import looked
from psi_kv_governor.native import building
from psi_kv_governor.sandbox.sandbox import Sandbox
from psi_kv_governor.user_folders import cache_folder

MEMINFO = "MemTotal:        8000000 kB\nMemAvailable:    4000000 kB\n"
PSI = "some avg10=0.00 avg60=0.00 avg300=0.00 total=7\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=5\n"
SWAPS = "Filename\tType\tSize\tUsed\tPriority\n"


@pytest.fixture
def root(tmp_path) -> Path:
    """A machine with memory and nothing else."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(MEMINFO)
    return tmp_path


@pytest.fixture(autouse=True)
def no_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("PSIKV_NATIVE_DIR", str(cache_folder() / "native"))  # an agent may be there already
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_pressure_is_read_from_the_kernel(root):
    (root / "proc" / "pressure").mkdir()
    (root / "proc" / "pressure" / "memory").write_text(PSI)
    found = preflight.check_pressure(root)
    assert (found.state, found.remedy) == ("ok", "")
    assert "pressure/memory" in found.detail


def test_without_psi_headroom_is_left_and_the_remedy_named(root):
    found = preflight.check_pressure(root)
    assert found.state == "warn"
    assert "headroom alone" in found.detail
    assert "psi=1" in found.remedy


def test_every_rung_of_the_ladder_has_its_line(root):
    (root / "proc" / "pressure").mkdir()
    (root / "proc" / "pressure" / "memory").write_text(PSI)
    lines = preflight.check_pressure(root).more
    assert len(lines) == 9
    assert [line.split()[0] for line in lines[3:]] == ["no", "no", "read", "no", "spare", "no"]
    assert all(": " in line and "\n" not in line for line in lines)


def test_pressure_that_the_service_manager_turned_off_is_no_failure(root, monkeypatch):
    monkeypatch.setenv("MEMORY_PRESSURE_WATCH", "/dev/null")
    found = preflight.check_pressure(root)
    assert found.state == "warn"
    assert "MemoryPressureWatch=off" in found.remedy


def test_a_machine_that_tells_nothing_fails(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    found = preflight.check_pressure(tmp_path)
    assert found.state == "fail"
    assert "/proc" in found.remedy


def test_checking_pressure_leaves_no_file_open():
    """In a process of its own: here a thread or an object of an earlier test may open or close one."""

    def left_open() -> int:
        before = len(list(Path("/proc/self/fd").iterdir()))
        preflight.check_pressure()
        return len(list(Path("/proc/self/fd").iterdir())) - before

    gc.collect()
    assert looked(left_open, int) == 0


def test_the_own_cgroup_and_its_limit_are_named(root):
    group = root / "sys" / "fs" / "cgroup" / "box"
    group.mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("0::/box\n")
    (root / "proc/self/mountinfo").write_text(
        "31 23 0:28 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n"
    )
    (group / "cgroup.events").write_text("populated 1\n")
    (group / "memory.max").write_text(f"{450 << 20}\n")
    (group / "memory.current").write_text(f"{150 << 20}\n")
    found = preflight.check_cgroup(root)
    assert found.state == "ok"
    assert found.detail == f"v2 {group}; 300 MiB free of 450 MiB, memory.max of {group}"
    assert found.more == ("3,906 MiB free of 7,812 MiB, MemAvailable of machine",)


def test_without_a_cgroup_it_says_what_to_mount(root):
    found = preflight.check_cgroup(root)
    assert found.state == "warn"
    assert "/sys/fs/cgroup" in found.remedy


def test_the_root_cgroup_is_told_from_one_without_the_memory_controller(root):
    (root / "sys/fs/cgroup").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("0::/\n")
    (root / "proc/self/mountinfo").write_text(
        "31 23 0:28 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n"
    )
    assert "the root, which has no limit" in preflight.check_cgroup(root).detail


def test_programs_that_kill_before_the_kernel_are_named(root):
    assert preflight.check_lines(root, {}).detail.startswith("none is to be seen")
    (root / "proc/12").mkdir()
    (root / "proc/12/comm").write_text("earlyoom\n")
    (root / "proc/12/cmdline").write_bytes(b"/usr/bin/earlyoom\0-m\x0015\0")
    found = preflight.check_lines(root, {"KUBERNETES_SERVICE_HOST": "x"})
    assert "earlyoom kills at 15 % available; kubelet evicts at memory.available<100Mi" in found.detail


@pytest.mark.parametrize(("mode", "state"), [("0", "ok"), ("1", "ok"), ("2", "warn"), ("", "ok")])
def test_strict_overcommit_is_named(root, mode, state):
    (root / "proc/sys/vm").mkdir(parents=True)
    (root / "proc/sys/vm/overcommit_memory").write_text(f"{mode}\n")
    (root / "proc/meminfo").write_text(MEMINFO + "CommitLimit: 4096000 kB\nCommitted_AS: 2048000 kB\n")
    found = preflight.check_overcommit(root)
    assert found.state == state
    if state == "warn":
        assert "of 4,000 MiB that may be promised 2,000 MiB are" in found.detail


def test_swap_devices_are_named(root):
    (root / "proc/swaps").write_text(SWAPS + "/dev/zram0 partition 1048576 0 100\n/swap file 2048 0 -2\n")
    found = preflight.check_swap(root)
    assert (found.state, found.detail) == ("ok", "/dev/zram0 (1,024 MiB), /swap (2 MiB)")


@pytest.mark.parametrize("content", [None, "", SWAPS])
def test_without_swap_it_warns(root, content):
    if content is not None:
        (root / "proc/swaps").write_text(content)
    found = preflight.check_swap(root)
    assert found.state == "warn"
    assert "zram" in found.remedy


@pytest.mark.parametrize(
    ("effective", "may"), [("000001ffffffffff", True), ("00000000a80425fb", False), ("0", False)]
)
def test_the_capability_for_short_triggers_is_told(root, monkeypatch, effective, may):
    monkeypatch.setattr(Sandbox, "available", staticmethod(lambda swap="none": (True, "")))
    (root / "proc/self/status").write_text(f"Name:\tpython\nCapEff:\t{effective}\nSeccomp:\t0\n")
    found = preflight.check_privileges(root)
    assert found.state == "ok"
    assert ("no CAP_SYS_RESOURCE" not in found.detail) == may


def test_without_a_cgroup_of_its_own_it_says_why(root, monkeypatch):
    monkeypatch.setattr(Sandbox, "available", staticmethod(lambda swap="none": (False, "run it as root")))
    found = preflight.check_privileges(root)
    assert (found.state, found.remedy) == ("warn", "run it as root")


def test_a_compiler_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    found = llama_doctor.check_compiler()
    assert found.state == "warn"
    assert "no-such-compiler" in found.remedy


def refuse(*_):
    raise EngineError("install it")


def test_without_llama_cpp_the_rest_of_the_engine_is_not_tried(monkeypatch, tmp_path):
    monkeypatch.setattr(loader, "llama_cpp_version", refuse)
    found = {check.name: check for check in doctor.run_checks(GovernorConfig(), tmp_path / "none.gguf")}
    assert (found["llama.cpp"].state, found["llama.cpp"].remedy) == ("warn", "install it")
    assert not any(name.startswith("can ") for name in found)
    assert found["model"].state == "fail"


def test_an_agent_that_does_not_compile_is_a_failure(monkeypatch):
    monkeypatch.setattr(building, "agent_path", refuse)
    found = llama_doctor.check_agent()
    assert (found.state, found.remedy) == ("fail", "install it")


def test_the_place_is_tried_and_measured(tmp_path):
    found = preflight.check_place(GovernorConfig(place=str(tmp_path), place_reserve_bytes=0))
    if "memory" in found.remedy:
        pytest.skip("the temporary directory is in memory here")
    assert found.state == "ok"
    assert "MB/s" in found.detail
    assert "caches are born in" in found.detail


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"place": "/proc/nowhere"}, "PSI_KV_PLACE"),
        ({"place": "/dev/shm"}, "tmpfs"),
        ({"place_reserve_bytes": 1 << 60}, "reserve"),
    ],
)
def test_a_place_that_keeps_nothing_is_told(settings, remedy):
    found = preflight.check_place(GovernorConfig(**settings))
    assert found.state == "fail"
    assert remedy in found.remedy


def test_the_demo_model_need_not_be_here(monkeypatch, tmp_path):
    monkeypatch.setenv("PSI_KV_MODELS", str(tmp_path))
    found = llama_doctor.check_model()
    assert found.state == "warn"
    assert "psi-kv model fetch" in found.remedy


def test_a_model_that_was_named_must_be_one(tmp_path):
    assert llama_doctor.check_model(tmp_path / "absent.gguf").state == "fail"


@pytest.mark.llama
def test_with_a_model_its_steps_are_proved(shallow_model):
    config = GovernorConfig()
    found = {check.name: check for check in doctor.run_checks(config, shallow_model)}
    assert found["agent"].state == "ok"
    assert [found[f"can {step}"].state for step in ("release", "park", "mask")] == ["ok"] * 3
    assert "MiB went back" in found["can park"].detail


@pytest.mark.llama
def test_a_model_that_llama_cpp_refuses_is_one_failure(tmp_path):
    path = tmp_path / "empty.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    assert llama_doctor.check_model(path).state == "ok"
    (found,) = llama_doctor.check_engine(path, GovernorConfig())
    assert (found.name, found.state) == ("engine", "fail")
    assert "\n" not in found.remedy


def test_whoever_wants_no_place_is_told_what_that_means(tmp_path):
    found = preflight.check_place(GovernorConfig(place="none"))
    assert (found.state, "gone" in found.detail) == ("ok", True)


@pytest.mark.llama
def test_without_a_place_the_doctor_says_that_running_conversations_evict(shallow_model):
    (found,) = [
        check
        for check in llama_doctor.check_engine(shallow_model, GovernorConfig(place="none"))
        if check.name == "can evict"
    ]
    assert found.state == "ok"
    assert "MiB went back in a trial" in found.detail
    assert "gone until it is decoded again" in found.detail
