"""A large cache takes no more than its rows, and without swap it is not what the kernel kills for."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from psi_kv_governor.pressure.cgroup import find_cgroups

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


def run_child(kind: str, layers: int, tokens: int, steps: int, enter: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, str(HERE / "large_cache_child.py"), kind, str(layers), str(tokens), str(steps)]
    return start(command, enter)


def start(command: list[str], enter: str = "", spared: bool = False) -> subprocess.Popen[str]:
    """Start a program, in the cgroup whose `cgroup.procs` is `enter`; the kernel kills no `spared` one."""
    spare = "echo -1000 2>/dev/null > /proc/self/oom_score_adj; " if spared else ""
    shell = ["/bin/sh", "-c", spare + 'test -z "$0" || echo $$ > "$0"; exec "$@"', enter, *command]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    return subprocess.Popen(
        shell, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ, start_new_session=True
    )


def said(child: subprocess.Popen[str], word: str) -> str:
    """The rest of the next line, which begins with `word`."""
    line = child.stdout.readline()
    assert line.startswith(word), f"{line!r} instead of {word}; ended with {child.poll()}"
    return line[len(word) :].strip()


@pytest.mark.slow
def test_a_cache_of_8b_shapes_takes_its_rows_and_less_than_a_stock_one():
    """2,000 tokens and 40 steps; a stock cache copies all of it at every step, and its heap keeps holes."""
    resident, tokens = {}, {}
    for kind in ("stock", "memory"):
        child = run_child(kind, 32, 2048, 40)
        said(child, "filled")
        child.stdin.write("go\n")
        child.stdin.flush()
        resident[kind] = int(said(child, "resident"))
        said(child, "step_s")
        tokens[kind] = said(child, "tokens")
        assert child.wait() == 0
    rows = (2048 + 40) * 32 * 2 * 8 * 128 * 2
    assert tokens["memory"] == tokens["stock"]
    assert resident["memory"] < resident["stock"]
    assert resident["memory"] < 1.1 * rows


@contextlib.contextmanager
def memory_cgroup() -> Iterator[Path]:
    """A cgroup of this test's own whose memory can be limited."""
    own = find_cgroups()
    parent = own.memory_v1 or own.unified
    if parent is None or os.geteuid() != 0:
        pytest.skip("cgroup: there is no memory cgroup that this test could make one in")
    folder = parent.folder / f"psi-kv-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"cgroup: none can be made here: {error.strerror}")
    try:
        if not (folder / limit_file(folder)).exists():
            pytest.skip("cgroup: the memory controller is not delegated here")
        yield folder
    finally:
        for _ in range(100):
            for line in (folder / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(line), signal.SIGKILL)
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.05)


def limit_file(folder: Path) -> str:
    return "memory.limit_in_bytes" if (folder / "memory.usage_in_bytes").exists() else "memory.max"


def used_bytes(folder: Path) -> int:
    name = "memory.usage_in_bytes" if limit_file(folder) == "memory.limit_in_bytes" else "memory.current"
    return int((folder / name).read_text())


def scene(kind: str) -> tuple[int | None, str]:
    """A neighbour takes what the cache holds while tokens are decoded, in a cgroup without swap: how the
    program ended (None: it lives), and its tokens."""
    with memory_cgroup() as folder:
        child = run_child(kind, 8, 3072, 40, str(folder / "cgroup.procs"))
        said(child, "filled")
        limit = used_bytes(folder) + 48 * MIB
        (folder / limit_file(folder)).write_text(str(limit))
        with contextlib.suppress(OSError):
            (folder / "memory.swap.max").write_text("0")
        with contextlib.suppress(OSError):
            (folder / "memory.memsw.limit_in_bytes").write_text(str(limit))
        # Spared: on a busy machine a killed program's memory comes back late, and this one was killed too.
        taker = [sys.executable, "-c", NEIGHBOUR.format(mib=120)]
        neighbour = start(taker, str(folder / "cgroup.procs"), spared=True)
        said(neighbour, "took it")  # and holds it
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write("go\n")
            child.stdin.flush()
        lines = child.stdout.read().splitlines()
        tokens = next((line for line in lines if line.startswith("tokens")), "")
        code = child.wait()
        neighbour.stdin.close()
        neighbour.wait()
        return code or None, tokens


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_swap_a_stock_cache_is_killed_and_one_born_in_a_file_lives():
    died, _ = scene("stock")
    assert died == -signal.SIGKILL
    lived, tokens = scene("file")
    assert lived is None
    reference = run_child("stock", 8, 3072, 40)
    said(reference, "filled")
    answer, _ = reference.communicate("go\n", timeout=800)
    assert tokens == next(line for line in answer.splitlines() if line.startswith("tokens"))
