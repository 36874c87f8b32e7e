"""A real vLLM engine in a memory cgroup without swap, and a neighbour that wants four times what is left.

Run by the Python that vLLM is installed in (`make test-vllm` makes one). `vllm_kills.py` plays it and keeps a
record, tests/vllm/test_vllm_pressure.py holds what it shows.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from psi_kv_governor import socket_place
from psi_kv_governor.engines.vllm.http import descendants
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.events import Trimmed
from psi_kv_governor.sandbox.cgroups import set_limit
from psi_kv_governor.sandbox.sandbox import Sandbox
from psi_kv_governor.status_client import connect, messages
from psi_kv_governor.status_messages import Update
from psi_kv_governor.whole_file import whole_file
from psikv_bench.machine import Machine, command_line, machine

CHILD = Path(__file__).with_name("vllm_scene_child.py")
KINDS = ("stock", "governed")
MIB = 1 << 20
LIMIT_BYTES = 5 << 30
KV_MIB, SPARE_MIB, NEIGHBOUR_MIB = 1024, 300, 1200
PRESSED_ROUNDS = 8
"""Rounds of the work that have to end after the neighbour has all that it wants."""
QUIET = {  # of a test and a scene alike
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
ENVIRON = {**QUIET, "PSI_KV_BACKING": "file"}  # others may have made swap


class EngineEndedError(Exception):
    """It was killed."""


class Engine:
    """The child, and what it says."""

    def __init__(
        self,
        sandbox: Sandbox,
        folder: Path,
        kind: str,
        *,
        model: str = "wide",
        processes: int = 1,
        prefix: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        **options: object,
    ) -> None:
        environ = {**os.environ, **ENVIRON, **(environ or {})}
        environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(processes > 1))
        with (folder / f"{kind}.log").open("wb") as log:
            self.child = sandbox.popen(
                [*prefix, sys.executable, str(CHILD), kind, str(folder / model), json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environ,
            )
        self.rounds: list[dict[str, Any]] = []

    def hear(self, event: str) -> dict[str, Any]:
        """The next line that tells of `event`. Raises EngineEndedError where it ends before."""
        for line in self.child.stdout or ():
            told: dict[str, Any] = json.loads(line) if line.startswith(b"{") else {}
            if told.get("event") == "round":
                self.rounds.append(told)
            if told.get("event") == event:
                return told
        raise EngineEndedError(f"no {event}: it ended with {self.child.wait()}")

    def say(self, line: str) -> None:
        """A line. Raises BrokenPipeError where it has ended."""
        assert self.child.stdin is not None, "it is started with a pipe"
        self.child.stdin.write(f"{line}\n".encode())
        self.child.stdin.flush()

    def tokens_per_s(self, start_s: float, stop_s: float) -> float | None:
        """Of the rounds that began and ended in this time; None where there is none."""
        times = [(a["time_s"], b) for a, b in zip(self.rounds, self.rounds[1:], strict=False)]
        inside = [(b["time_s"] - a, b["tokens"]) for a, b in times if start_s <= a and b["time_s"] <= stop_s]
        return sum(n for _, n in inside) / sum(s for s, _ in inside) if inside else None


class Trims(threading.Thread):
    """Hears of each trim of the governor in `pids`, until the engine ends."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self.found: list[Trimmed] = []

    def run(self) -> None:
        """Listen. Ends where there is no governor."""
        pids = descendants(self._pid)
        with contextlib.suppress(PsiKvError, OSError):
            for governed in [one for one in socket_place.find() if one.pid in pids][:1]:
                with closing(connect(governed)) as connection:
                    for line in messages(connection):
                        events = line.events if isinstance(line, Update) else []
                        self.found += [event for event in events if isinstance(event, Trimmed)]


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one play."""

    kind: str
    rate_mib_s: int
    """Of the neighbour; 0 is as fast as it can."""
    kills: int
    same: bool | None
    """Whether the prompts that were cached said the same afterwards; None where the engine was killed."""
    taken_s: float | None
    """Until the neighbour had all that it wanted; None where it was killed."""
    calm_tokens_per_s: float | None
    pressed_tokens_per_s: float | None
    returned_bytes: list[int]
    """By each trim that returned something."""
    trim_s: list[float]
    """From its beginning until the system had these bytes."""


def play(folder: Path, kind: str, rate_mib_s: int) -> Told:
    """The engine with its cache filled and at work, when a neighbour comes."""
    with Sandbox(LIMIT_BYTES) as sandbox:
        engine = Engine(sandbox, folder, kind)
        engine.hear("filled")
        trims = Trims(engine.child.pid)
        trims.start()
        began_s = time.monotonic()
        narrow(sandbox, sandbox.group.usage_bytes() + SPARE_MIB * MIB)
        engine.say("go")
        same, taken_s, pressed_s, pressed_to_s = None, None, began_s, began_s
        with contextlib.suppress(EngineEndedError, BrokenPipeError):
            for _ in range(3):
                engine.hear("round")
            pressed_s = time.monotonic()
            neighbour, taken_s = press(sandbox, rate_mib_s)
            ended_s = time.monotonic()
            while engine.hear("round")["time_s"] < ended_s:
                pass
            for _ in range(PRESSED_ROUNDS):
                engine.hear("round")
            pressed_to_s = time.monotonic()
            neighbour.terminate()  # what was cached is read back whole: beside it that takes minutes
            engine.say("stop")
            same = engine.hear("again")["same"]
        given = [trim for trim in trims.found if trim.bytes_returned]
        return Told(
            kind=kind,
            rate_mib_s=rate_mib_s,
            kills=sandbox.group.oom_kills(),
            same=same,
            taken_s=taken_s,
            calm_tokens_per_s=engine.tokens_per_s(began_s, pressed_s),
            pressed_tokens_per_s=None if same is None else engine.tokens_per_s(pressed_s, pressed_to_s),
            returned_bytes=[trim.bytes_returned for trim in given],
            trim_s=[round(trim.seconds, 4) for trim in given],
        )


def press(
    sandbox: Sandbox, rate_mib_s: int, mib: int = NEIGHBOUR_MIB
) -> tuple[subprocess.Popen[bytes], float | None]:
    """A neighbour that takes so much and goes on using it, and the seconds that it took; None where it was
    killed."""
    argv = [sys.executable, str(Path(__file__).with_name("psikv_bench") / "load.py"), "--kind", "ramp"]
    argv += ["--mib", str(mib), "--rate-mib-s", str(rate_mib_s)]
    started = time.monotonic()
    neighbour = sandbox.popen(argv, stdout=subprocess.PIPE)
    for line in neighbour.stdout or ():
        if json.loads(line)["event"] == "taken":
            threading.Thread(target=_heard_out, args=(neighbour,), daemon=True).start()
            return neighbour, time.monotonic() - started
    return neighbour, None


def _heard_out(neighbour: subprocess.Popen[bytes]) -> None:
    """A full pipe would have it wait."""
    for _ in neighbour.stdout or ():
        pass


class Where(msgspec.Struct, kw_only=True):
    """Where it was measured: the head of each record."""

    command: str = msgspec.field(default_factory=command_line)
    machine: Machine = msgspec.field(default_factory=machine)
    vllm: str = msgspec.field(default_factory=lambda: metadata.version("vllm-cpu"))


def keep(record: Where, path: Path | None) -> None:
    """Write it to `path`, whole or not at all; None: it was not asked for."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")


def load_average() -> float:
    """Of the minute before: above 0.5, others were using the machine."""
    return round(os.getloadavg()[0], 2)


def scheduled(pid: int) -> dict[str, tuple[float, float]]:
    """By thread, the seconds that it ran and that it waited to run: proc_pid_schedstat(5)."""
    found = {}
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError, ValueError):
            ran_ns, waited_ns, _ = map(int, (task / "schedstat").read_text().split())
            found[task.name] = (ran_ns / 1e9, waited_ns / 1e9)
    return found


def narrow(sandbox: Sandbox, limit_bytes: int) -> None:
    """Give the cgroup less from now on, where the kernel can get there."""
    with contextlib.suppress(OSError):
        set_limit(sandbox.group, limit_bytes, 0)
