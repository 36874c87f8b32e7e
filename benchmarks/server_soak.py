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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from psi_kv_governor.model import demo_model_path
from psi_kv_governor.sandbox.sandbox import Sandbox
from psikv_bench.server.asking import Client, Dead, Run, default_command, free_port, prompts

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


class Look(msgspec.Struct):
    """A process at one moment."""

    time_s: float
    who: str
    """`server` or `sidecar`."""
    anonymous_bytes: int
    descriptors: int
    mappings: int
    """Without those of saved states, each of which is one: the server keeps them up to a limit of its own."""
    saved: int
    """Mappings of files without a name, which saved states are, and the cache."""
    threads: int
    file_bytes: int
    """Disk space of the files without a name that it holds."""


def look(pid: int, who: str, time_s: float) -> Look | None:
    """None where it has ended."""
    try:
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        saved = sum(line.endswith(" (deleted)") for line in lines)
        files, descriptors = {}, 0
        for link in Path(f"/proc/{pid}/fd").iterdir():
            descriptors += 1
            with contextlib.suppress(OSError):
                found = link.stat()
                if found.st_nlink == 0:
                    files[found.st_dev, found.st_ino] = found.st_blocks * 512
        return Look(
            time_s, who, int(status["RssAnon"].split()[0]) << 10, descriptors,
            len(lines) - saved, saved, int(status["Threads"]), sum(files.values()),
        )  # fmt: skip
    except (OSError, KeyError):
        return None


def growth(looks: Sequence[Look], who: str, of: Callable[[Look], float]) -> tuple[float, float]:
    """Mean of the first third once settled, and of the last third."""
    values = [of(one) for one in looks if one.who == who]
    values = values[int(len(values) * SETTLED) :]
    part = max(1, len(values) // 3)
    return sum(values[:part]) / part, sum(values[-part:]) / part


class Soak:
    """One run."""

    def __init__(self, command: Sequence[str], limit: Sandbox, seed: int) -> None:
        self.looks: list[list[Look]] = [[], []]
        """Of the first sidecar's time, and the second's."""
        self.failed: list[str] = []
        self.run = Run(governed=True)
        self._dice, self._limit, self._port = random.Random(seed), limit, free_port()
        self._begin_s = time.monotonic()
        self._ended = threading.Event()
        self._words = [word.replace("{port}", str(self._port)) for word in command]

    def _started(self, words: Sequence[str]) -> subprocess.Popen[bytes]:
        return self._limit.popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def _ask(self, number: int) -> None:
        """A client: conversations that return, and one-shot prompts."""
        dice, client = random.Random(number), Client(self._port, self.run, self._begin_s)
        while not self._ended.is_set():
            kind, which = (
                ("return", dice.randrange(6)) if dice.random() < 0.6 else ("one-shot", dice.getrandbits(32))
            )
            try:
                client.ask(kind, which, prompts(kind, which, dice.randrange(40, 400)))
            except Dead as dead:
                self.failed.append(f"{time.monotonic() - self._begin_s:.0f} s: {dead}")
                self._ended.wait(1)

    def _watch(self, pids: dict[str, int], to: list[Look], until_s: float) -> None:
        while time.monotonic() < until_s:
            now_s = time.monotonic() - self._begin_s
            to += [one for who, pid in pids.items() if (one := look(pid, who, now_s))]
            time.sleep(SAMPLE_S)

    def play(self, minutes: float, load_mib: int, place: str) -> None:
        """Everything, from start to end."""
        where = ["--place", place] if place else []
        exec_ = [sys.executable, "-m", "psi_kv_governor.cli", "exec", *where]
        sidecar = self._started([*exec_, "--", *self._words])
        Client(self._port, self.run, self._begin_s).ready(sidecar)
        (server,) = map(int, Path(f"/proc/{sidecar.pid}/task/{sidecar.pid}/children").read_text().split())
        load = self._started([sys.executable, "-c", LOAD, "1", str(load_mib)])
        clients = [threading.Thread(target=self._ask, args=(number,)) for number in range(3)]
        for client in clients:
            client.start()
        try:
            half_s = minutes * 30
            self._watch({"server": server, "sidecar": sidecar.pid}, self.looks[0], time.monotonic() + half_s)
            sidecar.kill()
            sidecar.wait()
            again = self._started([*exec_, "--pid", str(server)])
            self._watch({"server": server, "sidecar": again.pid}, self.looks[1], time.monotonic() + half_s)
            if again.poll() is not None:
                self.failed.append("the second sidecar ended")
            again.send_signal(signal.SIGTERM)
            again.wait(60)
        finally:
            self._ended.set()
            load.kill()
            load.wait()
            for client in clients:
                client.join(120)
            with contextlib.suppress(ProcessLookupError):
                os.kill(server, signal.SIGTERM)

    def figures(self) -> dict[str, Any]:
        """What grew, of each half."""
        return {
            f"{who} {name}, sidecar {half + 1}": [round(value) for value in growth(looks, who, of)]
            for half, looks in enumerate(self.looks)
            for who in ("server", "sidecar")
            for name, of in (
                ("anonymous bytes", lambda one: one.anonymous_bytes),
                ("descriptors", lambda one: one.descriptors),
                ("mappings", lambda one: one.mappings),
                ("mappings of saved states", lambda one: one.saved),
                ("threads", lambda one: one.threads),
                ("bytes of files", lambda one: one.file_bytes),
            )
            if looks
        }


@click.command()
@click.option("--minutes", default=60.0, show_default=True)
@click.option("--limit-mib", default=320, show_default=True, help="Memory of the container.")
@click.option("--load-mib", default=60, show_default=True, help="Most that the neighbour takes, at random.")
@click.option("--place", default="", help="Where context is parked.")
@click.option("--seed", default=1, show_default=True)
@click.option("--out", default=Path("out/server-soak"), type=click.Path(path_type=Path), show_default=True)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def main(
    *,
    minutes: float,
    limit_mib: int,
    load_mib: int,
    place: str,
    seed: int,
    out: Path,
    command: tuple[str, ...],
) -> None:
    """Serve COMMAND under pressure for a while."""
    limit = Sandbox(limit_mib << 20)
    soak = Soak(list(command) or default_command(str(demo_model_path())), limit, seed)
    try:
        soak.play(minutes, load_mib, place)
    finally:
        kills = limit.group.oom_kills()
        limit.close()
    figures = soak.figures()
    for name, (first, last) in figures.items():
        click.echo(f"{name:<40} {first:>14,} {last:>14,}")
    click.echo(f"{len(soak.run.requests)} answers, {len(soak.failed)} failed, {kills} kills")
    for one in soak.failed[:10]:
        click.echo(f"failed at {one}")
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "scene": "server-soak", "minutes": minutes, "limit_mib": limit_mib, "load_mib": load_mib,
        "kills": kills, "answers": len(soak.run.requests), "failed": soak.failed, "growth": figures,
        "looks": msgspec.to_builtins(soak.looks),
    }  # fmt: skip
    (out / "server-soak.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
