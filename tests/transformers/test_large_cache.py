"""A large cache takes no more than its rows, and without swap it is not what the kernel kills for."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from psi_kv_governor.sandbox.cgroups import set_limit
from psi_kv_governor.sandbox.sandbox import Sandbox

HERE = Path(__file__).parent
MIB = 1 << 20

NEIGHBOUR = """
import sys, time
held = []
for _ in range({mib} // 4):
    held.append(bytearray(4 << 20))  # zeroed, so touched
    time.sleep(0.01)
print("took it", flush=True)
sys.stdin.readline()
"""


def command(kind: str, layers: int, tokens: int, steps: int) -> list[str]:
    return [sys.executable, str(HERE / "large_cache_child.py"), kind, str(layers), str(tokens), str(steps)]


def start(command: list[str], within: Sandbox | None = None) -> subprocess.Popen[str]:
    # Without holes in the heap, which vary from run to run by a third of the cache.
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
        "MALLOC_MMAP_THRESHOLD_": str(128 << 10),
    }
    popen = subprocess.Popen if within is None else within.popen
    return popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)


def said(child: subprocess.Popen[str], word: str) -> str:
    """The rest of the next line, which begins with `word`."""
    line = child.stdout.readline()
    assert line.startswith(word), f"{line!r} instead of {word}; ended with {child.poll()}"
    return line[len(word) :].strip()


@pytest.mark.slow
def test_a_cache_of_8b_shapes_takes_its_rows_and_no_more_than_a_stock_one():
    """1,000 tokens and 40 steps. Of 279 MB of rows either process takes 279 to 281."""
    resident, tokens = {}, {}
    for kind in ("stock", "memory"):
        child = start(command(kind, 32, 1024, 40))
        said(child, "filled")
        child.stdin.write("go\n")
        child.stdin.flush()
        resident[kind] = int(said(child, "resident"))
        said(child, "step_s")
        tokens[kind] = said(child, "tokens")
        assert child.wait() == 0
    rows = (1024 + 40) * 32 * 2 * 8 * 128 * 4
    assert tokens["memory"] == tokens["stock"]
    assert resident["memory"] < 1.03 * resident["stock"]
    assert resident["memory"] < 1.03 * rows


def scene(kind: str) -> tuple[int | None, str, str]:
    """A neighbour takes what the cache holds while tokens are decoded, in a cgroup without swap: how the
    program ended (None: it lives), its tokens, and what the neighbour said. Where the program is killed, its
    memory may come back too late for the neighbour."""
    with Sandbox(2048 * MIB) as sandbox:
        child = start(command(kind, 8, 1536, 40), sandbox)
        said(child, "filled")
        set_limit(sandbox.group, sandbox.group.usage_bytes() + 48 * MIB, 0)
        neighbour = start([sys.executable, "-c", NEIGHBOUR.format(mib=120)], sandbox)
        took = neighbour.stdout.readline()  # and holds it
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write("go\n")
            child.stdin.flush()
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
    reference = start(command("stock", 8, 1536, 40))
    said(reference, "filled")
    answer, _ = reference.communicate("go\n", timeout=800)
    assert tokens == next(line for line in answer.splitlines() if line.startswith("tokens"))
