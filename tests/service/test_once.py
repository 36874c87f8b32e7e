"""A program that runs already, without an agent in it, is parked once from outside and notices nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import PSI_KV, Server, free_port, resident_bytes
from service_help import compiled_in

from waiting import PATIENCE_S

MIB = 1 << 20
HOLDS_MIB = 48
# 48 MiB that are known, threads in calls that an interruption would end early.
HOLDS = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <time.h>
#include <unistd.h>
static const size_t n = 48ul << 20;
static volatile int disturbed, ended;
static int fds[2];
static void * sleeps(void * unused) {
    while (!ended) {
        struct timespec a = {0, 20000000};
        disturbed += nanosleep(&a, NULL) != 0;
    }
    return unused;
}
static void * reads(void * unused) { char c; disturbed += read(fds[0], &c, 1) != 1; return unused; }
static void * waits(void * unused) {  // the kernel never repeats this one: it is as with any debugger
    struct epoll_event e; int at = epoll_create1(0); epoll_wait(at, &e, 1, 300); return unused;
}
static uint64_t sum(const uint64_t * p) {
    uint64_t s = 0;
    for (size_t i = 0; i < n / 8; i++) s = s * 31 + p[i];
    return s;
}
int main(int count, char ** words) {
    uint64_t * p = malloc(n);
    for (size_t i = 0; i < n / 8; i++) p[i] = i & (1 << 19) ? 0 : i * 0x9E3779B97F4A7C15u;
    const uint64_t before = sum(p);
    pthread_t t[3];
    (void) !pipe(fds);
    void * (*const what[])(void *) = {sleeps, reads, waits};
    for (int i = 0; i < 3; i++) pthread_create(t + i, NULL, what[i], NULL);
    if (count > 1 && !strcmp(words[1], "traced")) ptrace(PTRACE_TRACEME, 0, NULL, NULL);
    if (count > 1 && !strcmp(words[1], "filtered")) {
        struct sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
        struct sock_fprog program = {1, &allow};
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
    }
    puts("up"); fflush(stdout);
    char line[8];
    (void) !fgets(line, sizeof(line), stdin);
    const int same = sum(p) == before;
    p[7]++;                                    // a copy of its own
    p = realloc(p, 2 * n);                     // never past the end of a file
    memset((char *) p + n, 1, n);
    p[7]--;
    const int grown = sum(p) == before;
    free(p);
    (void) !write(fds[1], "x", 1);
    ended = 1;
    for (int i = 0; i < 3; i++) pthread_join(t[i], NULL);
    printf("%s %s %d\n", same ? "same" : "CHANGED", grown ? "same" : "CHANGED", disturbed);
    return 0;
}
"""


@pytest.fixture(scope="module")
def holds(tmp_path_factory) -> Path:
    return compiled_in(tmp_path_factory.mktemp("holds"), "holds", HOLDS, "-O1", "-pthread")


@contextlib.contextmanager
def running(*command: str, **options) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    ) as process:
        try:
            assert process.stdout.readline() == "up\n"
            yield process
        finally:
            process.kill()


def attach(pid: int, folder: Path, *before: str) -> subprocess.CompletedProcess[str]:
    command = [*before, *PSI_KV, "exec", "--place", str(folder), "--pid", str(pid)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)


def _parked_and_the_same(process: subprocess.Popen[str], folder: Path) -> None:
    before = resident_bytes(process.pid)
    done = attach(process.pid, folder)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "stood still for" in done.stderr
    assert f"{HOLDS_MIB} MiB of 1 allocations" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert resident_bytes(process.pid) <= before - (HOLDS_MIB - 2) * MIB
    assert not list(folder.rglob("*.*")), "the file has no name"
    said, _ = process.communicate("go on\n", timeout=PATIENCE_S)
    assert said == "same same 0\n"
    assert process.returncode == 0


def test_what_it_holds_leaves_memory_and_is_the_same_and_no_call_of_it_was_disturbed(holds, folder):
    with running(str(holds)) as process:
        _parked_and_the_same(process, folder)


def test_it_can_be_parked_again(holds, folder):
    with running(str(holds)) as process:
        assert attach(process.pid, folder).returncode == 0
        assert "nothing was parked" in attach(process.pid, folder).stderr
        assert process.communicate("go on\n", timeout=PATIENCE_S)[0] == "same same 0\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_root_parks_what_another_user_runs(holds, folder, tmp_path):
    shared = Path("/var/tmp") / f"psi-kv-holds-{os.getpid()}"  # where that user can reach it
    shutil.copy(holds, shared)
    shared.chmod(0o755)
    try:
        with running("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", str(shared)) as process:
            _parked_and_the_same(process, folder)
    finally:
        shared.unlink()


# -- where it can't be ----------------------------------------------------------------------------------


def _refused(process: subprocess.Popen[str], done: subprocess.CompletedProcess[str], why: str) -> None:
    assert done.returncode == 2
    assert why in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert process.communicate("go on\n", timeout=PATIENCE_S)[0] == "same same 0\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_of_another_user_s_process_it_is_said_who_may(holds, folder):
    if shutil.which("setpriv") is None:
        pytest.skip("there is no setpriv here")
    own = Path("/var/tmp") / f"psi-kv-place-{os.getpid()}"
    own.mkdir()
    os.chown(own, 65534, 65534)
    try:
        with running(str(holds)) as process:
            done = attach(process.pid, own, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
            _refused(process, done, "not yours to govern")
    finally:
        shutil.rmtree(own)


def test_one_that_is_traced_already_is_left_alone(holds, folder):
    with running(str(holds), "traced") as process:
        _refused(process, attach(process.pid, folder), "traces it already")


def test_one_whose_calls_are_filtered_is_left_alone(holds, folder):
    with running(str(holds), "filtered") as process:
        _refused(process, attach(process.pid, folder), "seccomp")


def test_one_that_is_stopped_is_left_alone(holds, folder):
    with running(str(holds)) as process:
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        done = attach(process.pid, folder)
        process.send_signal(signal.SIGCONT)
        _refused(process, done, "continue it first")


def test_one_that_is_not_there():
    done = subprocess.run([*PSI_KV, "exec", "--pid", "4194304"], capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "there is no process" in done.stderr


def test_without_a_place_nothing_is_touched(holds, tmp_path):
    with running(str(holds)) as process:
        done = attach(process.pid, Path("/dev/shm"))
        _refused(process, done, "/dev/shm")


# -- a real server ----------------------------------------------------------------------------------------


@pytest.mark.llama
@pytest.mark.slow
def test_a_server_that_runs_already_is_parked_once_and_every_token_is_the_same(
    server_command, folder, tmp_path
):
    talks = [f"Story {i}. " + "The quick brown fox jumps over the lazy dog. " * 8 for i in range(3)]

    def play(log: str, between) -> list:
        port = free_port()
        with Server(server_command(port), port, log=tmp_path / log) as server:
            first = [server.complete(text) for text in talks]
            between(server)
            return first + [server.complete(text + " And then") for text in talks]

    def park(server: Server) -> None:
        before = resident_bytes(server.pid)
        done = attach(server.pid, folder)
        assert done.returncode == 0, done.stderr
        assert resident_bytes(server.pid) <= 0.3 * before

    assert play("parked", park) == play("plain", lambda server: None)
