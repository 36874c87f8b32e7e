"""A real engine in a memory cgroup without swap: what is parked is really back, and nobody is killed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from psi_kv_governor import socket_place
from psi_kv_governor.cli._governed import ask
from psi_kv_governor.commands import Park
from psi_kv_governor.sandbox.sandbox import Sandbox

pytestmark = [pytest.mark.cgroup, pytest.mark.timeout(1300)]

HERE = Path(__file__).parent
MIB = 1 << 20
KV_MIB, SPARE_MIB, NEIGHBOUR_MIB = 1024, 300, 1200
ENVIRON = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PSI_KV_BACKING": "file",  # others may have made swap
}


class Engine:
    """The child, and what it says."""

    def __init__(self, sandbox: Sandbox, folder: Path, kind: str, *, processes: int) -> None:
        environ = {**os.environ, **ENVIRON, "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(processes > 1))}
        self.child = sandbox.popen(
            [sys.executable, str(HERE / "scene_child.py"), kind, str(folder / "wide"), "{}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / f"{kind}.log").open("wb"),
            env=environ,
        )

    def hear(self, event: str) -> dict:
        """The next line that tells of `event`; a failure where the engine ends before."""
        for line in self.child.stdout:
            told = json.loads(line) if line.startswith(b"{") else {}
            if told.get("event") == event:
                return told
        raise EngineEndedError(f"no {event}: it ended with {self.child.wait()}")

    def say(self, line: str) -> None:
        self.child.stdin.write(f"{line}\n".encode())
        self.child.stdin.flush()


class EngineEndedError(Exception):
    """It was killed."""


@contextlib.contextmanager
def engine(folder: Path, kind: str, *, processes: int = 1) -> Iterator[tuple[Sandbox, Engine]]:
    with Sandbox(5 << 30) as sandbox:
        yield sandbox, Engine(sandbox, folder, kind, processes=processes)


def narrow(sandbox: Sandbox, limit_bytes: int) -> None:
    """Give the cgroup less from now on."""
    for name in ("memory.max", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"):
        file = sandbox.group.memory / name
        if file.exists():
            with contextlib.suppress(OSError):
                file.write_text(str(limit_bytes))


def descendants(pid: int) -> set[int]:
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def scene(folder: Path, kind: str, rate_mib_s: int) -> dict:
    """The engine with its cache filled and at work; a neighbour takes four times what is left."""
    with engine(folder, kind) as (sandbox, one):
        one.hear("filled")
        narrow(sandbox, sandbox.group.usage_bytes() + SPARE_MIB * MIB)
        one.say("go")
        one.hear("round")
        argv = [sys.executable, "-m", "psi_kv_governor.sandbox.load", "--kind", "ramp"]
        argv += ["--mib", str(NEIGHBOUR_MIB), "--rate-mib-s", str(rate_mib_s)]
        started = time.monotonic()
        neighbour = sandbox.popen(argv, stdout=subprocess.PIPE)
        taken_s = None
        for line in neighbour.stdout:
            if json.loads(line)["event"] == "taken":
                taken_s = time.monotonic() - started
                break
        try:
            for _ in range(2):
                one.hear("round")
            one.say("stop")
            same = one.hear("again")["same"]
        except (EngineEndedError, BrokenPipeError):
            same = None
        return {"same": same, "kills": sandbox.group.oom_kills(), "taken_s": taken_s}


@pytest.mark.slow
def test_a_neighbour_that_takes_more_than_is_left_kills_nobody(tmp_path):
    """At 200 MB/s."""
    told = scene(tmp_path, "governed", 200)
    assert told == {"same": True, "kills": 0, "taken_s": told["taken_s"]}
    assert told["taken_s"] is not None


@pytest.mark.slow
def test_without_us_it_kills(tmp_path):
    """The scene is one: stock vLLM, or its neighbour, does not live through it."""
    assert scene(tmp_path, "stock", 200)["kills"] > 0


@pytest.mark.slow
def test_an_idle_engine_gives_its_cache_back_when_it_is_asked_to(tmp_path):
    """By the status socket, as `psi-kv park` does; and says the same afterwards."""
    with engine(tmp_path, "governed", processes=2) as (sandbox, one):
        one.hear("filled")
        before = sandbox.group.usage_bytes()
        (governed,) = [it for it in socket_place.find() if it.pid in descendants(one.child.pid)]
        started = time.monotonic()
        result = ask(governed, Park()).result
        print(f"parked {result.bytes_returned >> 20} MiB in {time.monotonic() - started:.2f} s")
        assert result.bytes_returned > 0.8 * KV_MIB * MIB
        assert sandbox.group.usage_bytes() < before - 0.7 * KV_MIB * MIB
        one.say("idle")
        one.say("on")
        assert one.hear("again")["same"]
