"""`psi-kv exec` is not noticed by a program: status, signals, terminal, descriptors, environment."""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import PSI_KV, children_of, lines_of_ours

from waiting import PATIENCE_S


@contextlib.contextmanager
def started(*program: str) -> Iterator[subprocess.Popen[str]]:
    """`psi-kv exec` with a program that waits; neither outlives the test."""
    process = subprocess.Popen(
        [*PSI_KV, "exec", "--", *program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        for pid in (*children_of(process.pid), process.pid) if process.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
        process.communicate()


# -- status ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 1, 7, 255])
def test_the_exit_status_is_the_program_s(run, status):
    assert run("sh", "-c", f"exit {status}").returncode == status


def test_a_program_that_is_killed_by_a_signal_is_told_as_killed_by_it(run):
    assert run("sh", "-c", "kill -SEGV $$").returncode == -signal.SIGSEGV


def test_output_and_input_are_the_program_s(run):
    done = run("cat", input="through\n")
    assert done.stdout == "through\n"


def test_a_program_without_llama_cpp_runs_as_it_is_and_that_is_said_once(run):
    done = run("echo", "hello")
    assert (done.stdout, done.returncode) == ("hello\n", 0)
    assert len(lines_of_ours(done.stderr)) == 1
    assert "psi-kv doctor -- echo" in done.stderr


# -- signals --------------------------------------------------------------------------------------------

WAITS = """
import signal, sys
awaited = {signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1}
signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
print("up", flush=True)
seen = []
while signal.SIGTERM not in seen:
    seen.append(int(signal.sigwait(awaited)))
    print(*seen, flush=True)
sys.exit(len(seen) + 40)
"""


def test_signals_that_we_are_sent_reach_the_program(python):
    with started(python, "-c", WAITS) as process:
        assert process.stdout.readline().startswith("up")
        for sent, seen in ((signal.SIGHUP, "1"), (signal.SIGUSR1, "1 10"), (signal.SIGINT, "1 10 2")):
            process.send_signal(sent)
            assert process.stdout.readline().strip() == seen
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 44


def test_no_thread_of_ours_can_be_given_a_signal_of_the_program(python):
    """One that does not block it would end us and leave the program without its parent."""
    with started(python, "-c", WAITS) as process:
        assert process.stdout.readline().startswith("up")
        mine = {}
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            fields = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
            mine[int(task.name)] = int(fields["SigBlk"], 16)
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)
    del mine[process.pid]  # it waits for them: the kernel shows them as not blocked meanwhile
    assert len(mine) >= 2
    assert all(
        blocked & 1 << (signal.SIGTERM - 1) and blocked & 1 << (signal.SIGINT - 1)
        for blocked in mine.values()
    )


def test_ctrl_c_at_a_terminal_reaches_the_program_once(python):
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [*PSI_KV, "exec", "--", python, "-c", WAITS])
    with os.fdopen(terminal, "r+b", buffering=0) as screen:
        assert b"up" in screen.readline()
        screen.write(b"\x03")
        while not (line := screen.readline().replace(b"^C", b"").strip()):
            pass
        assert line == b"2"
        os.kill(pid, signal.SIGTERM)  # handed on after whatever was handed on before
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42


def _masks(text: str) -> dict[str, int]:
    pairs = (line.split(":") for line in text.splitlines() if line.startswith("Sig"))
    real_time = 0x1_8000_0000  # 32 and 33 are the C library's own
    return {name: int(value, 16) & ~real_time for name, value in pairs if name in {"SigBlk", "SigIgn"}}


def test_the_program_starts_with_the_signals_that_it_would_have_without_us(run):
    look = ("cat", "/proc/self/status")
    alone = subprocess.run(look, capture_output=True, text=True, check=True)
    assert _masks(run(*look).stdout) == _masks(alone.stdout)


def test_what_the_user_had_ignored_stays_ignored(run):
    ignoring = ("sh", "-c", 'trap "" HUP; exec "$@"', "sh")
    look = ("cat", "/proc/self/status")
    alone = subprocess.run((*ignoring, *look), capture_output=True, text=True, check=True)
    ignored = _masks(run(*look, before=ignoring).stdout)["SigIgn"]
    assert ignored & 1 << (signal.SIGHUP - 1)
    assert ignored == _masks(alone.stdout)["SigIgn"]  # who started the tests may have ignored more


def test_the_program_has_no_descriptors_of_ours(run):
    look = ("sh", "-c", "ls /proc/self/fd | wc -l")
    alone = subprocess.run(look, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    assert run(*look, stdin=subprocess.DEVNULL).stdout == alone.stdout


# -- the first process of a container, and a service ----------------------------------------------------


@pytest.fixture
def own_pids() -> tuple[str, ...]:
    words = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    if (
        shutil.which("unshare") is None
        or subprocess.run([*words, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no pid namespace can be made here")
    return words


def test_as_pid_1_it_passes_the_status_on_and_reaps_orphans(run, own_pids, python):
    # The grandchild is left to pid 1 when its parent ends; a zombie would still be listed.
    script = """
import os, time
if os.fork() == 0:
    if os.fork() == 0:
        os._exit(0)
    os._exit(0)
os.wait()
deadline = time.monotonic() + 200
while time.monotonic() < deadline:
    states = []
    for p in filter(str.isdigit, os.listdir("/proc")):
        try:
            states.append(open(f"/proc/{p}/stat").read().rsplit(")", 1)[1].split()[0])
        except OSError:
            pass  # reaped meanwhile
    if "Z" not in states: break
    time.sleep(0.05)
print(os.getppid(), "Z" in states)
raise SystemExit(9)
"""
    done = run(python, "-c", script, before=own_pids)
    assert done.stdout == "1 False\n", done.stderr
    assert done.returncode == 9


def test_as_pid_1_a_killed_program_is_told_as_a_shell_does(run, own_pids):
    assert run("sh", "-c", "kill -KILL $$", before=own_pids).returncode == 128 + signal.SIGKILL


def test_the_service_manager_is_told(tmp_path, run):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE_S)
        run("true", env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")})
        assert [manager.recv(100) for _ in range(2)] == [b"READY=1", b"STOPPING=1"]


# -- beside other libraries, and with many children -----------------------------------------------------

WRAPS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
int atoi(const char * text) {
    int (*real)(const char *) = (int (*)(const char *)) dlsym(RTLD_NEXT, "atoi");
    return real == atoi ? -1 : real(text) + 1000;
}
"""
ASKS = """
#include <stdio.h>
#include <stdlib.h>
int main(int n, char ** words) { printf("%d\\n", atoi(words[n - 1])); return 0; }
"""


def test_a_library_that_the_user_preloads_stays_and_finds_what_stands_behind_it(run, compiled):
    library = compiled("wraps.so", WRAPS, "-shared", "-fPIC", "-O2", "-ldl")
    program = compiled("asks", ASKS, "-fno-builtin")
    preloaded = {**os.environ, "LD_PRELOAD": str(library)}
    alone = subprocess.run([program, "42"], env=preloaded, capture_output=True, text=True, check=True)
    assert alone.stdout == "1042\n"
    assert run(str(program), "42", env=preloaded).stdout == "1042\n"


def test_hundreds_of_short_lived_children_leave_nothing(run, folder):
    many = "for i in $(seq 300); do /bin/true || echo failed; done"
    count = f"ls /proc/$PPID/task /proc/$PPID/fd {folder} | wc -l"
    done = run("sh", "-c", f"{many}; {count}; {many}; {count}", options=("--place", str(folder)))
    before, after = map(int, done.stdout.split())
    assert after - before < 30, "something is left of each"
