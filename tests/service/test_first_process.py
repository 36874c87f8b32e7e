"""`psi-kv exec` as the first process of a container-like root: read-only, with one writable disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from servers import PSI_KV

from psi_kv_governor.native.building import agent_path
from psi_kv_governor.residence import find_place
from psi_kv_governor.sandbox.sandbox import Sandbox
from waiting import PATIENCE_S

MIB = 1 << 20
DISK = "/mnt"
"""Where the root has its writable disk."""
TRAPS = "trap 'echo got it; exit 7' TERM; echo ready; while :; do sleep 0.1; done"
ORPHANS = """
(sleep 0.05 &) ; (sleep 0.05 &)
for _ in $(seq 200); do
  sleep 0.05
  left=$(cat /proc/[0-9]*/stat 2>/dev/null | grep -c '(sleep) [SZ] 1 ')
  [ "$left" = 0 ] && echo reaped && exit 0
done
"""
LEVELS = """
import json, subprocess, sys, time
for _ in range(200):  # it is told of before its first reading
    done = subprocess.run([*sys.argv[1:], "status", "1", "--json"], capture_output=True, text=True)
    if done.returncode == 0 and '"limit_bytes":' in done.stdout.partition('"levels":')[2]:
        break
    time.sleep(0.05)
print(done.stdout or done.stderr)
"""
MODEL = """
import sys
from llama_cpp import Llama
llm = Llama(sys.argv[1], n_ctx=2048, n_threads=1, verbose=False)
llm.eval(llm.tokenize(b"The capital of France is"))
print(*{line.split(maxsplit=5)[5].split("/#")[0] for line in open("/proc/self/maps") if "/mnt" in line})
"""


@pytest.fixture
def disk(tmp_path) -> Path:
    if (found := find_place(str(tmp_path))).place is None:
        pytest.skip(f"the tests' folder is no place to park: {found.why_none}")
    return tmp_path


@pytest.fixture
def root(disk) -> list[str]:
    """The command that makes such a root around what follows it, as process 1."""
    command = [
        "bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--unshare-pid", "--proc", "/proc", "--as-pid-1",
        "--bind", str(disk), DISK, "--die-with-parent",
        "--setenv", "TMPDIR", DISK, "--setenv", "HOME", "/",
        "--unsetenv", "XDG_RUNTIME_DIR", "--unsetenv", "XDG_CACHE_HOME",
    ]  # fmt: skip
    if shutil.which("bwrap") is None:
        pytest.skip("there is no bubblewrap: apt install bubblewrap")
    tried = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"bubblewrap may make no such root here: {tried.stderr.strip()}")
    return [*command, "--setenv", "PSIKV_NATIVE_DIR", str(agent_path().parent)]


def run(root: list[str], *program: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*root, *PSI_KV, "exec", *options, "--", *program],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False, cwd="/",
    )  # fmt: skip


def test_it_is_the_first_process_and_the_root_is_read_only(root):
    done = run(root, "sh", "-c", f"echo $PPID; touch /etc/x; touch {DISK}/x && echo written")
    assert done.stdout == "1\nwritten\n", done.stderr
    assert "Read-only file system" in done.stderr


@pytest.mark.parametrize(("ending", "status"), [("exit 7", 7), ("kill -KILL $$", 128 + signal.SIGKILL)])
def test_it_ends_as_the_program_ends(root, ending, status):
    assert run(root, "sh", "-c", ending).returncode == status


def test_the_place_to_park_is_the_disk(root):
    told = json.loads(run(root, "true", options=("--dry-run", "--json")).stdout)
    assert told["place"].startswith(f"{DISK}/psi-kv-"), told
    assert told["governed"]


def test_a_signal_to_the_first_process_reaches_the_program(root):
    read, write = os.pipe()
    process = subprocess.Popen(
        [*root, "--json-status-fd", str(write), *PSI_KV, "exec", "--", "sh", "-c", TRAPS],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd="/", pass_fds=(write,),
    )  # fmt: skip
    os.close(write)
    try:
        with open(read) as status:
            first = next(json.loads(line)["child-pid"] for line in status if "child-pid" in line)
            assert process.stdout.readline() == "ready\n"
            os.kill(first, signal.SIGTERM)
            out, _ = process.communicate(timeout=PATIENCE_S)
        assert out == "got it\n"
        assert process.returncode == 7
    finally:
        process.kill()
        process.wait()


def test_orphans_are_reaped(root):
    assert run(root, "sh", "-c", ORPHANS).stdout == "reaped\n"


@pytest.mark.cgroup
def test_the_limit_around_it_is_seen(root):
    able, why = Sandbox.available()
    if not able:
        pytest.skip(why)
    with Sandbox(300 * MIB) as sandbox:
        program = [sys.executable, "-c", LEVELS, *PSI_KV]
        process = sandbox.popen([*root, *PSI_KV, "exec", "--", *program], stdout=subprocess.PIPE, cwd="/")
        told = json.loads(process.communicate(timeout=2 * PATIENCE_S)[0])
    assert 300 * MIB in limits_in(told)


def limits_in(told: object) -> set[int]:
    """Every `limit_bytes` in what `status --json` says."""
    if isinstance(told, dict):
        inner = set().union(*(limits_in(value) for value in told.values()))
        return inner | ({told["limit_bytes"]} if told.get("limit_bytes") else set())
    return set().union(*(limits_in(one) for one in told)) if isinstance(told, list) else set()


@pytest.mark.llama
def test_a_model_s_cache_lives_in_a_file_on_that_disk(root, demo_model):
    done = run(root, sys.executable, "-c", MODEL, str(demo_model), options=("--backing", "file"))
    assert done.returncode == 0, done.stderr
    assert f"{DISK}/psi-kv-" in done.stdout
    assert "ungoverned" not in done.stderr
