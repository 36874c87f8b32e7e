"""The daily death of a server in a container, ungoverned and governed.

200 one-shot prompts and ten conversations that return, within a memory limit that stands for a container. The
server is anybody's: `xllamacpp` by default, or a command with {port} in it. Writes a JSON record and a plot.

    python benchmarks/server_bench.py --limit-mib 300
    python benchmarks/server_bench.py --limit-mib 2000 -- llama-server -m MODEL -c 32768 --port {port}
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

SENTENCE = "The quick brown fox jumps over the lazy dog and goes home. "
SENTENCE_TOKENS = 13
READY_S, ANSWER_S, SAMPLE_S = 300.0, 600.0, 0.2


class Sample(msgspec.Struct):
    time_s: float
    usage_bytes: int


class Request(msgspec.Struct):
    """One prompt, and how long its first token took."""

    kind: str
    """`first` turn of a conversation, `return` of it, or `one-shot`."""
    number: int
    time_s: float
    first_token_s: float
    prompt_n: int
    """Tokens of the prompt that were decoded."""
    seconds: float


class Run(msgspec.Struct):
    """One server, from start to end or death."""

    governed: bool
    died: str = ""
    """What it was doing when it was killed; '' where it was not."""
    kills: int = 0
    peak_bytes: int = 0
    requests: list[Request] = []
    usage: list[Sample] = []

    def first_token_s(self, kind: str) -> float:
        """Median over the requests of that kind; NaN where there was none."""
        times = [one.first_token_s for one in self.requests if one.kind == kind]
        return statistics.median(times) if times else float("nan")


class Limit:
    """A memory cgroup of its own (v1 or v2), without swap."""

    def __init__(self, n_bytes: int) -> None:
        unified = Path("/sys/fs/cgroup/cgroup.controllers")
        self._v2 = unified.is_file() and "memory" in unified.read_text()
        root = Path("/sys/fs/cgroup") if self._v2 else Path("/sys/fs/cgroup/memory")
        self._folder = root / f"psi-kv-server-bench-{os.getpid()}"
        self._folder.mkdir()
        if self._v2:
            (self._folder / "memory.max").write_text(str(n_bytes))
            (self._folder / "memory.swap.max").write_text("0")
        else:
            (self._folder / "memory.limit_in_bytes").write_text(str(n_bytes))
            with contextlib.suppress(OSError):
                (self._folder / "memory.memsw.limit_in_bytes").write_text(str(n_bytes))
        self._usage = self._folder / ("memory.current" if self._v2 else "memory.usage_in_bytes")

    def enter(self) -> None:
        """In the child, before it becomes the server."""
        (self._folder / "cgroup.procs").write_text(str(os.getpid()))

    def usage_bytes(self) -> int:
        return int(self._usage.read_text())

    def kills(self) -> int:
        file = self._folder / ("memory.events" if self._v2 else "memory.oom_control")
        fields = dict(line.split() for line in file.read_text().splitlines())
        return int(fields.get("oom_kill", 0))

    def close(self) -> None:
        for pid in (self._folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                self._folder.rmdir()
                return
            except OSError:
                time.sleep(0.1)


class Dead(Exception):
    """The server is gone."""


class Client:
    """Asks one server, and writes down what it takes."""

    def __init__(self, port: int, run: Run, begin_s: float) -> None:
        self._port, self._run, self._begin_s = port, run, begin_s

    def ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise Dead("starting")
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
                connection.request("GET", "/v1/models")
                if connection.getresponse().status == 200:
                    return
            time.sleep(0.1)
        raise Dead("starting (it did not answer)")

    def ask(self, kind: str, number: int, prompt: str) -> None:
        """One streamed completion. Raises Dead."""
        body = {"prompt": prompt, "n_predict": 8, "temperature": 0, "cache_prompt": True, "stream": True}
        begin_s = time.monotonic()
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=ANSWER_S)
            connection.request("POST", "/completion", json.dumps(body), {"content-type": "application/json"})
            first_s, told = None, {}
            for line in connection.getresponse():
                if line.startswith(b"data: {"):
                    first_s = first_s or time.monotonic()
                    told = json.loads(line[6:])
        except (OSError, http.client.HTTPException) as error:
            raise Dead(f"{kind} {number}") from error
        if first_s is None or "timings" not in told:
            raise Dead(f"{kind} {number}")
        now_s = time.monotonic()
        self._run.requests.append(
            Request(
                kind=kind, number=number, time_s=begin_s - self._begin_s, first_token_s=first_s - begin_s,
                prompt_n=told["timings"]["prompt_n"], seconds=now_s - begin_s,
            )
        )  # fmt: skip


def prompts(kind: str, number: int, tokens: int) -> str:
    return f"{kind} number {number}. " + SENTENCE * max(1, tokens // SENTENCE_TOKENS)


def scene(client: Client, talks: int, shots: int, tokens: int, shot_tokens: int) -> None:
    """Conversations begin, one-shot prompts come in between, and the conversations return."""
    for number in range(talks):
        client.ask("first", number, prompts("Story", number, tokens))
    for number in range(shots):
        client.ask("one-shot", number, prompts("Question", number, shot_tokens))
        if number % max(1, shots // talks) == max(1, shots // talks) - 1:
            returning = number // max(1, shots // talks) % talks
            client.ask("return", returning, prompts("Story", returning, tokens) + " And then")


def play(
    command: Sequence[str], limit_bytes: int, *, governed: bool, place: str, plan: dict[str, int]
) -> Run:
    run, limit, port = Run(governed=governed), Limit(limit_bytes), _free_port()
    words = [word.replace("{port}", str(port)) for word in command]
    if governed:
        where = ["--place", place] if place else []
        words = [sys.executable, "-m", "psi_kv_governor.cli", "exec", *where, "--", *words]
    begin_s, ended = time.monotonic(), threading.Event()

    def watch() -> None:
        while not ended.wait(SAMPLE_S):
            run.usage.append(Sample(time.monotonic() - begin_s, limit.usage_bytes()))

    watching = threading.Thread(target=watch)
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=limit.enter,  # noqa: PLW1509  # one thread yet
    )  # fmt: skip
    watching.start()
    try:
        client = Client(port, run, begin_s)
        client.ready(process)
        scene(client, **plan)
    except Dead as death:
        run.died = str(death)
    finally:
        ended.set()
        watching.join()
        run.kills = limit.kills()
        run.peak_bytes = max((sample.usage_bytes for sample in run.usage), default=0)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        limit.close()
        process.wait()
    return run


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def summary(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        first, again = run.first_token_s("first"), run.first_token_s("return")
        who = "governed  " if run.governed else "ungoverned"
        end = f"killed at {run.died}" if run.died else "served all"
        yield (
            f"{who}  {end}: {len(run.requests)} answers, {run.kills} kills, peak {run.peak_bytes >> 20} MiB, "
            f"first token {first:.2f} s, of a returning one {again:.3f} s ({first / again:.0f} x less)"
        )


def plot(runs: Sequence[Run], limit_bytes: int, target: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (memory, times) = pyplot.subplots(2, 1, figsize=(9, 7), layout="constrained")
    for run in runs:
        name, colour = ("governed", "tab:green") if run.governed else ("ungoverned", "tab:red")
        at_s = [sample.time_s for sample in run.usage]
        memory.plot(at_s, [s.usage_bytes / 2**20 for s in run.usage], color=colour, label=name)
        if run.died and at_s:
            memory.plot(at_s[-1], limit_bytes / 2**20, "x", color=colour, markersize=12)
        for kind, mark in (("first", "o"), ("return", "v")):
            asked = [one for one in run.requests if one.kind == kind]
            if asked:
                seconds = [one.first_token_s for one in asked]
                label = f"{name}: {kind}"
                times.semilogy([one.time_s for one in asked], seconds, mark, color=colour, label=label)
    memory.axhline(limit_bytes / 2**20, color="black", linestyle="--", label="limit")
    memory.set_ylabel("memory of the container (MiB)")
    times.set_ylabel("time to first token (s)")
    times.set_xlabel("seconds")
    for axes in (memory, times):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.savefig(target)


def default_command() -> list[str]:
    """The server of `xllamacpp`, from the environment that the tests keep."""
    from platformdirs import user_cache_path

    from psi_kv_governor.model import demo_model_path

    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    python = user_cache_path("psi-kv") / "test-servers" / f"python-{version}" / "bin" / "python"
    if not python.is_file():
        raise click.UsageError("run the tests of tests/service once (they fetch a server), or give a COMMAND")
    script = Path(__file__).parents[1] / "tests" / "service" / "xllamacpp_server.py"
    return [str(python), str(script), str(demo_model_path()), "{port}", "32768"]


@click.command()
@click.option("--limit-mib", default=300, show_default=True, help="Memory of the container.")
@click.option("--talks", default=10, show_default=True, help="Conversations that return.")
@click.option("--shots", default=200, show_default=True, help="One-shot prompts.")
@click.option("--tokens", default=1500, show_default=True, help="Of a conversation.")
@click.option("--shot-tokens", default=200, show_default=True, help="Of a one-shot prompt.")
@click.option("--repeats", default=1, show_default=True, help="Pairs of runs, interleaved.")
@click.option("--place", default="", help="Where context is parked.")
@click.option("--out", default=Path("out/server"), type=click.Path(path_type=Path), show_default=True)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def main(limit_mib: int, repeats: int, place: str, out: Path, command: tuple[str, ...], **plan: int) -> None:
    """Serve COMMAND in a limit, ungoverned and governed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server and its limit go with us
    words, limit_bytes, runs = list(command) or default_command(), limit_mib << 20, []
    for _ in range(repeats):
        for governed in (False, True):
            run = play(words, limit_bytes, governed=governed, place=place, plan=plan)
            runs.append(run)
            click.echo(next(summary([run])))
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "scene": "server",
        "command": words,
        "limit_bytes": limit_bytes,
        "repeats": repeats,
        **plan,
        "machine": {"kernel": platform.release(), "cpus": os.cpu_count(), "machine": platform.machine()},
        "runs": runs,
    }
    (out / "server.json").write_bytes(msgspec.json.format(msgspec.json.encode(record)))
    plot(runs[-2:], limit_bytes, out / "server.png")
    click.echo(f"{out / 'server.json'} and {out / 'server.png'}")


if __name__ == "__main__":
    main()
