"""Whatever is wrong with a program or the machine: one line, and it runs as well as without us."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from servers import PSI_KV, lines_of_ours

from psi_kv_governor.native.building import agent_path
from waiting import PATIENCE_S

# -- what can't be started ------------------------------------------------------------------------------


def _one_line(done: subprocess.CompletedProcess[str], status: int, what: str) -> None:
    assert done.returncode == status
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert what in done.stderr


def test_a_program_that_is_missing(run):
    _one_line(run("there-is-no-such-program"), 127, "was not found")


def test_a_program_that_is_not_executable(run, tmp_path):
    (tmp_path / "text").write_text("echo\n")
    _one_line(run(str(tmp_path / "text")), 126, "chmod +x")


def test_a_folder(run, tmp_path):
    _one_line(run(str(tmp_path)), 126, "is a folder")


def test_a_script_whose_interpreter_is_missing(run, tmp_path):
    script = tmp_path / "script"
    script.write_text("#!/there/is/none\n")
    script.chmod(0o755)
    _one_line(run(str(script)), 127, "interpreter")


def test_a_program_for_another_architecture(run, tmp_path):
    foreign = tmp_path / "foreign"
    content = bytearray(Path(sys.executable).resolve().read_bytes()[:4096])
    content[18:20] = (0x1234).to_bytes(2, "little")
    foreign.write_bytes(content)
    foreign.chmod(0o755)
    _one_line(run(str(foreign)), 126, "another architecture")


def test_no_program_at_all(run):
    done = subprocess.run([*PSI_KV, "exec"], capture_output=True, text=True, check=False)
    _one_line(done, 2, "psi-kv exec -- PROGRAM")


def test_a_policy_that_does_not_exist_is_said_before_anything_is_started(run, tmp_path):
    done = run("touch", str(tmp_path / "started"), options=("--set", "policy=nonsense"))
    _one_line(done, 2, "nonsense")
    assert not (tmp_path / "started").exists()


# -- with less than everything --------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_setuid_program_runs_ungoverned_and_that_is_said(run, tmp_path):
    program = tmp_path / "other"
    shutil.copy("/bin/true", program)
    os.chown(program, 65534, -1)
    program.chmod(0o4755)
    _one_line(run(str(program)), 0, "setuid")


def test_without_a_compiled_agent_the_program_runs(run, tmp_path):
    nowhere = {
        "PSIKV_NATIVE_DIR": "/proc",
        "HOME": "/proc",
        "XDG_CACHE_HOME": "/proc",
        "TMPDIR": str(tmp_path),
    }
    done = run("echo", "runs", env={**os.environ, **nowhere, "CC": "/there/is/none"})
    assert (done.stdout, done.returncode) == ("runs\n", 0)
    assert len(lines_of_ours(done.stderr)) == 1


def test_without_a_governor_the_program_runs():
    fails = """
import psi_kv_governor.service.exec as exec_, psi_kv_governor.cli as cli
def fail(*args, **kwargs): raise RuntimeError("no source of pressure can be made")
exec_.Governor = fail
cli.main()
"""
    command = [sys.executable, "-c", fails, "exec", "--", "sh", "-c", "echo runs; exit 7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (done.stdout, done.returncode) == ("runs\n", 7)
    assert lines_of_ours(done.stderr) == [
        "psi-kv: sh runs ungoverned: the governor can't be made: no source of pressure can be made"
    ]


def test_on_a_root_that_is_read_only_with_no_place_to_park(run):
    script = 'mount -o remount,bind,ro / && exec "$@"'
    sandbox = ("unshare", "--mount", "--propagation", "private", "--", "sh", "-c", script, "sh")
    if subprocess.run([*sandbox, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespace can be made here")
    run("true")  # the agent is compiled where it is kept
    done = run("echo", "runs", before=sandbox)
    assert (done.stdout, done.returncode) == ("runs\n", 0), done.stderr
    assert len(lines_of_ours(done.stderr)) == 1
    bare = run("echo", "runs", before=sandbox, env={**os.environ, "XDG_CACHE_HOME": "/there/is/none"})
    assert (bare.stdout, bare.returncode) == ("runs\n", 0), bare.stderr
    assert "runs ungoverned" in bare.stderr


def test_exec_in_exec_leaves_the_outer_governor_alone(run):
    done = run(*PSI_KV, "exec", "--", "sh", "-c", 'echo "$PSIKV_SOCKET"')
    assert done.stdout.startswith("psi-kv-")
    assert len(lines_of_ours(done.stderr)) == 1  # of the outer one, at its end


def test_where_a_dead_exec_left_its_environment_the_next_one_governs(run):
    left = {**os.environ, "PSIKV_SOCKET": "psi-kv-of-somebody-who-is-gone"}
    done = run("sh", "-c", 'echo "$PSIKV_SOCKET"', env=left)
    assert done.stdout.startswith("psi-kv-")
    assert "gone" not in done.stdout


def test_an_agent_that_was_inherited_from_another_version_is_not_preloaded_as_well(run, folder):
    old = folder / "psikv-agent-0123456789abcdef01234567.so"
    left = {**os.environ, "LD_PRELOAD": f"{old} /usr/lib/libm.so.6"}
    done = run("sh", "-c", 'echo "$LD_PRELOAD"', env=left)
    first, *others = done.stdout.strip().split(":")
    assert Path(first) == agent_path()
    assert others == ["/usr/lib/libm.so.6"]


def test_where_the_socket_s_name_would_be_too_long_the_program_runs(run, tmp_path):
    """The status socket is a path; the agents' is none."""
    deep = tmp_path / ("d" * 120)
    deep.mkdir(mode=0o700)
    done = run("echo", "runs", env={**os.environ, "XDG_RUNTIME_DIR": str(deep), "TMPDIR": str(deep)})
    assert (done.stdout, done.returncode) == ("runs\n", 0), done.stderr


def test_two_in_a_row_are_two_governors(run):
    names = [run("sh", "-c", 'echo "$PSIKV_SOCKET"').stdout for _ in range(2)]
    assert len(set(names)) == 2
    assert all(name.startswith("psi-kv-") for name in names)


def test_a_dry_run_starts_nothing(run, tmp_path):
    done = run("touch", str(tmp_path / "made"), options=("--dry-run", "--json"))
    told = json.loads(done.stdout)
    assert told["governed"]
    assert told["reached"] == "later"
    assert not (tmp_path / "made").exists()


def test_what_a_unit_sets_means_nothing_where_no_service_manager_is(run, tmp_path):
    of_a_unit = {
        "NOTIFY_SOCKET": "/there/is/none",
        "MEMORY_PRESSURE_WATCH": "/there/is/none",
        "MEMORY_PRESSURE_WRITE": "bm9uc2Vuc2U=",
        "STATE_DIRECTORY": "/there/is/none",
        "CACHE_DIRECTORY": str(tmp_path),
        "INVOCATION_ID": "0" * 32,
    }
    done = run("sh", "-c", "exit 7", env={**os.environ, **of_a_unit})
    assert done.returncode == 7
    assert len(done.stderr.splitlines()) == 1, done.stderr  # that it opened no cache
