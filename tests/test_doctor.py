"""The doctor never fails itself, whatever lies under /proc and /sys and whatever a filter denies."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psi_kv_governor import doctor, preflight
from psi_kv_governor.checks import Check, Look, engine_checks
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.isolated import EndedError, looked
from warm import COMMANDS, PSI_KV, Warm

_BOX = "sys/fs/cgroup/box/"
PATHS = (
    *("proc/" + name for name in ("pressure/memory", "meminfo", "swaps", "vmstat", "zoneinfo", "7/comm")),
    *("proc/" + name for name in ("self/status", "self/cgroup", "self/mountinfo", "7/cmdline")),
    "proc/sys/vm/overcommit_memory",
    "sys/fs/cgroup/cgroup.controllers",
    *(
        _BOX + name
        for name in ("memory.max", "memory.high", "memory.current", "memory.stat", "memory.events")
    ),
    *(_BOX + name for name in ("memory.pressure", "memory.swap.max", "cgroup.events")),
    *(_BOX + name for name in ("memory.limit_in_bytes", "memory.usage_in_bytes")),
)
SENSIBLE = {
    "proc/meminfo": b"MemTotal: 800000 kB\nMemAvailable: 400000 kB\nCommitLimit: 1 kB\nCommitted_AS: 9 kB\n",
    "proc/self/cgroup": b"0::/box\n",
    "proc/self/mountinfo": b"31 23 0:28 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n",
    "proc/sys/vm/overcommit_memory": b"2\n",
    "proc/7/comm": b"earlyoom\n",
    "proc/7/cmdline": b"earlyoom\0-m\0nonsense\0",
    "proc/swaps": b"Filename Type Size Used Priority\n/dev/zram0 partition nonsense x y\n",
    "proc/pressure/memory": b"some avg10=0.00 avg60=0.00 avg300=0.00 total=7\n",
    "sys/fs/cgroup/box/memory.max": b"99999999999999999999999\n",
}
CONTENT = st.one_of(
    st.sampled_from(["absent", "folder", "loop", "nowhere", "sensible", "empty"]),
    st.binary(max_size=80),
    st.sampled_from(
        [b"max\n", b"-1\n", b"9" * 400, b"0::/../..\n", b"some avg10=nan total=1e9\n", b"\xff\0\n"]
    ),
)
CHECKS = (
    preflight.check_pressure, preflight.check_cgroup, preflight.check_lines, preflight.check_swap,
    preflight.check_overcommit, preflight.check_privileges,
)  # fmt: skip


def lay(root: Path, path: str, content: str | bytes) -> None:
    """One thing of the machine as it is, or as it never should be."""
    file = root / path
    if content == "absent":
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    if content == "folder":
        file.mkdir()
    elif content == "loop":
        file.symlink_to(file.name)
    elif content == "nowhere":
        file.symlink_to("/nowhere/at/all")
    else:
        file.write_bytes(
            SENSIBLE.get(path, b"1\n") if content == "sensible" else b"" if content == "empty" else content
        )


@settings(max_examples=150)
@given(st.fixed_dictionaries(dict.fromkeys(PATHS, CONTENT)))
def test_whatever_a_machine_s_files_are_each_check_has_its_line(tmp_path, machine):
    root = tmp_path / "root"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for path, content in machine.items():
        lay(root, path, content)
    for check in CHECKS:
        found = check(root)
        assert found.state in {"ok", "warn", "fail"}
        assert found.detail
        assert not any("\n" in text for text in (found.detail, found.remedy, *found.more))


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user (root)")
def test_files_that_may_not_be_read_are_told_about(tmp_path):
    """Root reads everything, so another user looks."""
    for path in PATHS:
        lay(tmp_path, path, "sensible")
        (tmp_path / path).chmod(0)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder not in {Path("/"), Path("/tmp")}:
            folder.chmod(folder.stat().st_mode | 0o011)

    def look() -> list[Check]:
        os.setgroups([])
        os.setgid(54321)
        os.setuid(54321)
        return [check(tmp_path) for check in CHECKS]

    assert len(looked(look, list[Check])) == len(CHECKS)


def test_what_kills_a_check_is_a_line_of_it():
    assert doctor._looked(Look("swap", lambda: os.kill(os.getpid(), 31), "warn"), isolated=True) == [
        Check("swap", "warn", "it can't be looked at: it was ended by SIGSYS", doctor._FILTER)
    ]


def test_what_a_check_raises_is_a_line_of_it():
    def look() -> list[Check]:
        raise RuntimeError("two\nlines")

    for isolated in (True, False):
        (found,) = doctor._looked(Look("place to park", look), isolated)
        assert (found.name, found.state) == ("place to park", "fail")
        assert found.detail == "it can't be looked at: RuntimeError: two lines"


GOOD = """
from psi_kv_governor.checks import Check, Look

def in_use():
    return False

def looks(config, model):
    found = yield Look("rows", lambda: [Check("rows", "ok", "all are there")])
    yield Look("told", lambda: [Check("told", "ok", found[0].detail)])
"""


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (GOOD, [("rows", "ok", "all are there"), ("told", "ok", "all are there")]),
        ("1 / 0\n", [("stranger", "fail", "it can't be looked at: ZeroDivisionError: division by zero")]),
        (
            GOOD.replace("return False", "1 / 0"),
            [("stranger", "fail", "it can't be looked at: ZeroDivisionError: division by zero")],
        ),
        (
            GOOD.replace("yield Look", "1 / 0; yield Look"),
            [("stranger", "fail", "it can't be looked at: ZeroDivisionError: division by zero")],
        ),
    ],
    ids=["good", "that does not load", "that does not say whether it is in use", "that raises"],
)
def test_an_engine_of_another_package_has_checks_of_its_own(monkeypatch, tmp_path, module, told):
    name = f"stranger_checks_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(module)
    info = tmp_path / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[psi_kv_governor.checks]\nstranger = {name}\n")
    monkeypatch.syspath_prepend(tmp_path)
    only = {"stranger": engine_checks()["stranger"]}
    monkeypatch.setattr(doctor, "engine_checks", lambda: only)
    found = [(one.name, one.state, one.detail) for one in doctor.run_checks(GovernorConfig(), isolated=True)]
    assert found[-len(told) :] == told
    assert found[0][0] == "pressure"


def test_where_no_engine_is_installed_it_says_so(monkeypatch):
    monkeypatch.setattr(doctor, "engine_checks", dict)
    *_, found = doctor.run_checks(GovernorConfig())
    assert (found.name, found.state) == ("engines", "fail")
    assert "pip install" in found.remedy


@pytest.mark.llama
def test_a_program_that_has_decoded_is_not_forked_to_be_looked_at(shallow_model):
    """The child would wait for ever for the decoding threads, which a fork does not take along."""
    program = (
        "import sys, pathlib\n"
        "from psi_kv_governor import doctor, llama\n"
        "from psi_kv_governor.config import GovernorConfig\n"
        "llm = llama.GovernedLlama(sys.argv[1], n_ctx=256, n_threads=2, verbose=False, auto=False)\n"
        "llm.eval([1] * 64)\n"
        "for check in doctor.run_checks(GovernorConfig(), pathlib.Path(sys.argv[1]), isolated=True):\n"
        "    print(check.name, check.state, sep=': ')\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(shallow_model)],
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )
    assert "can release: ok" in ran.stdout.splitlines(), ran.stdout + ran.stderr


def test_what_stands_still_is_not_waited_for():
    with pytest.raises(EndedError, match="longer than 0 s"):
        looked(lambda: time.sleep(60), int, longest_s=0.3)
    with pytest.raises(EndedError, match="status 3"):
        looked(lambda: os._exit(3), int)
    assert looked(lambda: [1, 2], list[int]) == [1, 2]


DOCTOR = ("doctor", "--json", "--model", "/nowhere.gguf")
OURS = (
    "mincore", "cachestat", "statfs", "fallocate", "fdatasync", "flock", "ftruncate", "mkdir", "chmod",
    "pwrite64", "epoll_ctl", "socket", "bind", "unlink", "rename", "inotify_init1", "uname", "ppoll",
    "sched_getaffinity", "capget", "prctl", "madvise", "sync_file_range",
)  # fmt: skip
"""What its checks call, and a Python that only prints may do without."""
COMPILER = Path(__file__).with_name("quick-cc")


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    with Warm(*COMMANDS) as process:
        yield process


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["refuse", "kill"])
@pytest.mark.parametrize("name", OURS)
def test_whatever_a_filter_denies_the_doctor_says_all_it_has_to_say(warm, home, name, how, tmp_path):
    environ = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(home), "CC": str(COMPILER)}
    # Python looks for a temporary folder in the working directory too, and may not remove what it tried with.
    done = warm.run(PSI_KV, DOCTOR, tmp_path, cwd=tmp_path, environ=environ, deny=[name], how=how)
    assert done.returncode in {0, 1}, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    names = [check["name"] for check in json.loads(done.stdout)["checks"]]
    assert {"pressure", "cgroup", "swap", "agent", "place to park", "model"} <= set(names)


def test_where_the_working_directory_may_not_be_read_the_settings_are_the_defaults(tmp_path):
    """`psi-kv.toml` of the working directory is asked for first."""
    script = "from psi_kv_governor.config import load_config; load_config(default_file=True); print('read')"
    (tmp_path / "shut").mkdir(mode=0o700)
    enter = ["setpriv", "--reuid", "54321", "--regid", "0", "--clear-groups", sys.executable, "-c", script]
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    done = subprocess.run(
        enter,
        cwd=tmp_path / "shut",
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"]},
    )
    assert done.stdout == "read\n", done.stderr[-2000:]


def test_the_place_and_the_agent_are_looked_at_with_any_setting():
    for place in ("/proc/nowhere", "\0", "a" * 5000, "/dev/null", "/dev/full/x"):
        assert preflight.check_place(GovernorConfig(place=place)).state == "fail"
