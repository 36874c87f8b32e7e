"""Every check says what it found, and what to do where something is missing; none ever raises."""

import sys
from pathlib import Path

import pytest

from psi_kv_governor import preflight
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engine.llama import native
from psi_kv_governor.errors import EngineError
from psi_kv_governor.sandbox.sandbox import Sandbox

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
    before = len(list(Path("/proc/self/fd").iterdir()))
    preflight.check_pressure()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


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
    assert found.detail == f"v2 {group}; 300 MiB free of the limit of 450 MiB in {group}"


def test_without_a_cgroup_it_says_what_to_mount(root):
    found = preflight.check_cgroup(root)
    assert found.state == "warn"
    assert "/sys/fs/cgroup" in found.remedy


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
    found = preflight.check_compiler()
    assert found.state == "warn"
    assert "no-such-compiler" in found.remedy


def refuse(*_):
    raise EngineError("install it")


def test_without_llama_cpp_the_rest_of_the_engine_is_not_tried(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "llama_cpp_package", refuse)
    found = {
        check.name: check
        for check in preflight.run_checks(GovernorConfig(store="none"), tmp_path / "none.gguf")
    }
    assert (found["llama.cpp"].state, found["llama.cpp"].remedy) == ("fail", "install it")
    assert "tap" not in found
    assert not any(name.startswith("can ") for name in found)
    assert found["model"].state == "fail"


def test_a_tap_that_does_not_compile_is_a_failure(monkeypatch):
    monkeypatch.setattr(native, "library_path", refuse)
    found = preflight.check_tap()
    assert (found.state, found.remedy) == ("fail", "install it")


def test_the_store_is_tried_and_measured(tmp_path):
    found = preflight.check_store(GovernorConfig(store_dir=str(tmp_path), store_reserve_bytes=0))
    if "returns nothing" in found.remedy:
        pytest.skip("the temporary directory is in memory here")
    assert found.state == "ok"
    assert "MB/s" in found.detail
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "state", "remedy"),
    [
        ({"store": "none"}, "warn", "store = 'disk'"),
        ({"store_dir": "/proc/nowhere"}, "fail", "point store_dir at"),
        ({"store_dir": "/dev/shm/psi-kv-test/../"}, "fail", "point store_dir at a disk"),
        ({"store_reserve_bytes": 1 << 60}, "fail", "reserve"),
    ],
)
def test_a_store_that_keeps_nothing_is_told(settings, state, remedy):
    found = preflight.check_store(GovernorConfig(**settings))
    assert found.state == state
    assert remedy in found.remedy


def test_the_demo_model_need_not_be_here(monkeypatch, tmp_path):
    monkeypatch.setenv("PSI_KV_MODELS", str(tmp_path))
    found = preflight.check_model()
    assert found.state == "warn"
    assert "psi-kv model fetch" in found.remedy


def test_a_model_that_was_named_must_be_one(tmp_path):
    assert preflight.check_model(tmp_path / "absent.gguf").state == "fail"


@pytest.mark.llama
def test_with_a_model_its_steps_are_proved(demo_model, tmp_path):
    config = GovernorConfig(store_dir=str(tmp_path))
    found = {check.name: check for check in preflight.run_checks(config, demo_model)}
    assert found["tap"].state == "ok"
    assert [found[f"can {step}"].state for step in ("release", "spill", "recompute")] == ["ok"] * 3


@pytest.mark.llama
def test_a_model_that_llama_cpp_refuses_is_one_failure(tmp_path):
    path = tmp_path / "empty.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    assert preflight.check_model(path).state == "ok"
    (found,) = preflight.check_engine(path)
    assert (found.name, found.state) == ("engine", "fail")
    assert "\n" not in found.remedy
