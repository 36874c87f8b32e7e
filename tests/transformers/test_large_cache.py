"""A large cache takes no more than its rows, and without swap it is not what the kernel kills for."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys

import large_cache_child
import pytest
from tiny import tiny_model

from psi_kv_governor.sandbox.cgroups import set_limit
from psi_kv_governor.sandbox.sandbox import Sandbox

MIB = 1 << 20
M_MMAP_THRESHOLD = -3

NEIGHBOUR = """
import sys, time
held = []
for _ in range({mib} // 4):
    held.append(bytearray(4 << 20))  # zeroed, so touched
    time.sleep(0.01)
print("took it", flush=True)
sys.stdin.readline()
"""


@pytest.fixture(autouse=True, scope="module")
def _imported():
    """The code of the models is imported with the first of them: here, and not in each child."""
    tiny_model()


class Forked:
    """A program with a large cache, in a process forked from this one: to import torch anew takes 12 s of a
    processor, and what it does takes one."""

    def __init__(self, *what: object, within: Sandbox | None = None) -> None:
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        self._code: int | None = None
        self._pid = os.fork()
        if not self._pid:
            self._run(what, within, theirs_in, theirs_out, [ours_in, ours_out])
        os.close(theirs_in)
        os.close(theirs_out)
        self.stdin, self.stdout = os.fdopen(ours_out, "w"), os.fdopen(ours_in)

    def _run(self, what, within, stdin: int, stdout: int, others: list[int]) -> None:
        code = 1
        try:
            for number in others:
                os.close(number)
            sys.stdin, sys.stdout = os.fdopen(stdin), os.fdopen(stdout, "w")
            for folder in within.group.folders if within is not None else ():
                (folder / "cgroup.procs").write_text(str(os.getpid()))
            # No holes in the heap, which vary from run to run by a third of the cache.
            assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 << 10) == 1
            large_cache_child.main(*what)
            sys.stdout.flush()
            code = 0
        finally:
            os._exit(code)

    def wait(self) -> int:
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
            self.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                self.stdin.close()
        return self._code


def go(child: Forked) -> None:
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write("go\n")
        child.stdin.flush()


def said(child: Forked, word: str) -> str:
    """The rest of the next line, which begins with `word`."""
    line = child.stdout.readline()
    assert line.startswith(word), f"{line!r} instead of {word}"
    return line[len(word) :].strip()


@pytest.mark.slow
def test_a_cache_of_8b_shapes_takes_its_rows_and_no_more_than_a_stock_one():
    """512 tokens and 8 steps: 136 MB of rows."""
    resident, tokens = {}, {}
    for kind in ("stock", "memory"):
        child = Forked(kind, 32, 512, 8)
        said(child, "filled")
        go(child)
        resident[kind] = int(said(child, "resident"))
        said(child, "step_s")
        tokens[kind] = said(child, "tokens")
        assert child.wait() == 0
    rows = (512 + 8) * 32 * 2 * 8 * 128 * 4
    assert tokens["memory"] == tokens["stock"]
    # A stock one holds its rows too: less is counted where the heap that it was forked with has room.
    assert resident["memory"] < 1.03 * max(resident["stock"], rows)


def scene(kind: str) -> tuple[int | None, str, str]:
    """A neighbour takes what the cache holds while tokens are decoded, in a cgroup without swap: how the
    program ended (None: it lives), its tokens, and what the neighbour said. Where the program is killed, its
    memory may come back too late for the neighbour."""
    with Sandbox(512 * MIB) as sandbox:  # of which it takes 200: more may not be free on a busy machine
        child = Forked(kind, 8, 1024, 10, within=sandbox)
        said(child, "filled")
        set_limit(sandbox.group, sandbox.group.usage_bytes() + 32 * MIB, 0)
        neighbour = sandbox.popen(
            [sys.executable, "-c", NEIGHBOUR.format(mib=80)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        took = neighbour.stdout.readline()  # and holds it
        go(child)
        lines = child.stdout.read().splitlines()
        tokens = next((line for line in lines if line.startswith("tokens")), "")
        code = child.wait()
        with contextlib.suppress(BrokenPipeError):
            neighbour.stdin.close()
        neighbour.wait()
        return code or None, tokens, took


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_swap_a_stock_cache_is_killed_and_one_born_in_a_file_lives():
    able, why = Sandbox.available()
    if not able:
        pytest.skip(f"cgroup: {why}")
    died, *_ = scene("stock")
    assert died == -signal.SIGKILL
    lived, tokens, took = scene("file")
    assert lived is None
    assert took == "took it\n"
    reference = Forked("stock", 8, 1024, 10)
    said(reference, "filled")
    go(reference)
    said(reference, "resident")
    said(reference, "step_s")
    assert tokens == "tokens " + said(reference, "tokens")
    assert reference.wait() == 0
