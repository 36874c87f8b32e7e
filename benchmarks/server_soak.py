"""A governed server in a container's limit, with random clients and random pressure, for as long as is asked.

Watched are memory, descriptors, mappings and parked files of the server and of its sidecar. In the middle the
sidecar is killed (SIGKILL): every answer goes on, and another one is attached (`psi-kv exec --pid`).

    python benchmarks/server_soak.py --minutes 60
    python benchmarks/server_soak.py --minutes 10 --limit-mib 2000 -- llama-server -m MODEL --port {port}
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from psi_kv_governor.model import demo_model_path
from psi_kv_governor.sandbox.process_memory import glance
from psi_kv_governor.sandbox.sandbox import Sandbox
from psikv_bench.server.asking import (
    SILENT,
    Client,
    Dead,
    Run,
    command,
    default_command,
    free_port,
    prompts,
    sidecar,
)

SAMPLE_S = 5.0
SETTLED = 0.25
"""Of each sidecar's time: slots and the prompt cache fill in it."""
LOAD = """
import random, sys, time
dice, most = random.Random(int(sys.argv[1])), int(sys.argv[2])
while True:
    taken = bytearray(dice.randrange(most << 20))
    taken[::4096] = b"x" * len(taken[::4096])
    time.sleep(dice.uniform(0.5, 3))
    del taken
    time.sleep(dice.uniform(0.5, 3))
"""


class Look(NamedTuple):
    """A process at one moment."""

    anonymous_bytes: int
    descriptors: int
    mappings: int
    """Without those of saved states, each of which is one: the server keeps them up to a limit of its own."""
    mappings_of_saved_states: int
    """Of files without a name, which saved states are, and the cache."""
    threads: int
    bytes_of_files: int
    """Disk space of the files without a name that it holds."""


def look(pid: int) -> Look | None:
    """None where it has ended."""
    process, memory = Path(f"/proc/{pid}"), glance(pid)
    if memory is None:
        return None
    try:
        lines = (process / "maps").read_text().splitlines()
        links = list((process / "fd").iterdir())
        threads = len(list((process / "task").iterdir()))
    except OSError:
        return None
    saved = sum(line.endswith(" (deleted)") for line in lines)
    files = {}
    for link in links:
        with contextlib.suppress(OSError):
            found = link.stat()
            if found.st_nlink == 0:
                files[found.st_dev, found.st_ino] = found.st_blocks * 512
    return Look(memory.anonymous_bytes, len(links), len(lines) - saved, saved, threads, sum(files.values()))


def growth(looks: Sequence[Look]) -> dict[str, list[int]]:
    """Of each quantity the mean of the first third once settled, and of the last third."""
    settled = looks[int(len(looks) * SETTLED) :]
    part = max(1, len(settled) // 3)
    first, last = (zip(*some, strict=True) for some in (settled[:part], settled[-part:]))
    return {
        name.replace("_", " "): [round(sum(one) / part), round(sum(other) / part)]
        for name, one, other in zip(Look._fields, first, last, strict=True)
    }


class Soak:
    """One run."""

    def __init__(self, words: Sequence[str], limit: Sandbox, place: str) -> None:
        self.growth: dict[str, list[int]] = {}
        self.failed: list[str] = []
        self.run = Run(governed=True)
        self._limit, self._place, self._port = limit, place, free_port()
        self._words = command(words, self._port, governed=True, place=place)
        self._begin_s, self._ended = time.monotonic(), threading.Event()

    def _started(self, words: Sequence[str]) -> subprocess.Popen[bytes]:
        return self._limit.popen(words, **SILENT)

    def _ask(self, number: int) -> None:
        """A client: conversations that return, and one-shot prompts."""
        dice, client = random.Random(number), Client(self._port, self.run, self._begin_s)
        while not self._ended.is_set():
            returns = dice.random() < 0.6
            kind, which = ("return", dice.randrange(6)) if returns else ("one-shot", dice.getrandbits(32))
            try:
                client.ask(kind, which, prompts(kind, which, dice.randrange(40, 400)))
            except Dead as dead:
                self.failed.append(f"{time.monotonic() - self._begin_s:.0f} s: {dead}")
                self._ended.wait(1)

    def _watch(self, half: int, seconds: float, **pids: int) -> None:
        looks: dict[str, list[Look]] = {who: [] for who in pids}
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            for who, pid in pids.items():
                looks[who] += filter(None, [look(pid)])
            time.sleep(SAMPLE_S)
        for who, some in looks.items():
            if some:
                self.growth |= {f"{who} {name}, sidecar {half}": two for name, two in growth(some).items()}

    def play(self, minutes: float, load_mib: int, seed: int) -> None:
        """Everything, from start to end."""
        first = self._started(self._words)
        Client(self._port, self.run, self._begin_s).ready(first)
        (server,) = map(int, Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split())
        load = self._started([sys.executable, "-c", LOAD, str(seed), str(load_mib)])
        clients = [threading.Thread(target=self._ask, args=(number,)) for number in range(3)]
        for client in clients:
            client.start()
        try:
            self._watch(1, minutes * 30, server=server, sidecar=first.pid)
            first.kill()
            first.wait()
            again = self._started([*sidecar(self._place), "--pid", str(server)])
            self._watch(2, minutes * 30, server=server, sidecar=again.pid)
            if again.poll() is not None:
                self.failed.append("the second sidecar ended")
            again.terminate()
            again.wait(60)
        finally:
            self._ended.set()
            load.kill()
            load.wait()
            for client in clients:
                client.join(120)
            with contextlib.suppress(ProcessLookupError):
                os.kill(server, signal.SIGTERM)


@click.command()
@click.option("--minutes", default=60.0, show_default=True)
@click.option("--limit-mib", default=320, show_default=True, help="Memory of the container.")
@click.option("--load-mib", default=60, show_default=True, help="Most that the neighbour takes, at random.")
@click.option("--place", default="", help="Where context is parked.")
@click.option("--seed", default=1, show_default=True, help="Of the neighbour.")
@click.option("--out", default=Path("out/server-soak"), type=click.Path(path_type=Path), show_default=True)
@click.argument("words", metavar="[COMMAND]...", nargs=-1, type=click.UNPROCESSED)
def main(*, out: Path, words: tuple[str, ...], place: str, limit_mib: int, **given: Any) -> None:
    """Serve COMMAND under pressure for a while."""
    with Sandbox(limit_mib << 20) as limit:
        soak = Soak(words or default_command(str(demo_model_path())), limit, place)
        soak.play(**given)
        kills = limit.group.oom_kills()
    for name, (early, late) in soak.growth.items():
        click.echo(f"{name:<40} {early:>14,} {late:>14,}")
    click.echo(f"{len(soak.run.requests)} answers, {len(soak.failed)} failed, {kills} kills")
    for one in soak.failed[:10]:
        click.echo(f"failed at {one}")
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "scene": "server-soak", "minutes": given["minutes"], "limit_mib": limit_mib,
        "load_mib": given["load_mib"], "kills": kills, "answers": len(soak.run.requests),
        "failed": soak.failed, "growth": soak.growth,
    }  # fmt: skip
    (out / "server-soak.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
