"""The daily death of a server in a container: one-shot prompts and returning conversations within a limit.

The server is somebody else's: `xllamacpp` by default, or a command with {port} in it. Ungoverned and governed
runs alternate; what it costs while nothing is short is asked of two servers side by side, by turns.
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated

import msgspec
from msgspec import Meta

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.sandbox.sandbox import Sandbox
from psikv_bench.figures import Asked, Figure, figure
from psikv_bench.options import Options
from psikv_bench.record import Recorder, Report
from psikv_bench.scene import Scene
from psikv_bench.server.asking import (
    KINDS,
    Client,
    Dead,
    Plan,
    Run,
    Sample,
    conversations,
    default_command,
    free_port,
    prompts,
)
from psikv_bench.server.plots import plot

SAMPLE_S = 0.2
NO_KILLS = Asked("<=", 0, "max")
SOONER = Asked(">=", 20)
AS_FAST = Asked(">=", 0.99)
_CALM_TOKENS = 200
_CALM_TALKS = 6  # more than the server's four slots: each that returns is loaded from the prompt cache


class ServerOptions(Options, frozen=True, kw_only=True):
    """What is served, and in how much memory."""

    repeats: Annotated[int, Meta(ge=0, description="Pairs of runs, ungoverned and governed.")] = 20
    limit_mib: Annotated[int, Meta(ge=64, description="Memory of the container.")] = 300
    talks: Annotated[int, Meta(ge=1, description="Conversations that return.")] = 10
    shots: Annotated[int, Meta(ge=1, description="One-shot prompts.")] = 200
    talk_tokens: Annotated[int, Meta(ge=13, description="Of a conversation.")] = 1500
    shot_tokens: Annotated[int, Meta(ge=13, description="Of a one-shot prompt.")] = 200
    calm_pairs: Annotated[int, Meta(ge=0, description="Requests to each of two servers with room.")] = 40
    place: Annotated[str, Meta(description="Where context is parked [found by itself].")] = ""
    server: Annotated[str, Meta(description="Another server's command, with {port} in it.")] = ""


def run(recorder: Recorder[ServerOptions]) -> Report:
    """Raises BadInputError where there is no server."""
    options = recorder.options
    words = shlex.split(options.server) or default_command(options.model)
    journal = recorder.journal(Run, msgspec.structs.replace(options, model="", repeats=0, calm_pairs=0))
    interrupted, ratios = False, dict[str, list[float]]()
    try:
        for number, governed in _order(options)[len(journal.parts) :]:
            recorder.say(f"run {number} of {options.repeats}, {'governed' if governed else 'ungoverned'}")
            journal.add(_play(words, options, governed=governed))
        for kind, ratio in _calm(words, options, recorder) if options.calm_pairs else ():
            ratios.setdefault(kind, []).append(ratio)
    except KeyboardInterrupt:
        interrupted = True
    runs: list[Run] = journal.parts
    if interrupted and not runs and not ratios:
        raise PsiKvError("interrupted before the first run was finished: there is nothing to report")
    report = recorder.report(
        list(_figures(runs, ratios)),
        [options.threads or 1],
        interrupted=interrupted,
        rows=[_short(one) for one in runs],
    )
    draw = [partial(plot, runs=runs[-2:], limit_bytes=options.limit_mib << 20)] if runs else []
    return recorder.save(report, (), *draw)


def _order(options: ServerOptions) -> list[tuple[int, bool]]:
    """Which repeat, and whether governed."""
    return [(number + 1, governed) for number in range(options.repeats) for governed in (False, True)]


def _short(run: Run) -> dict[str, object]:
    """A run without its samples; those of the last two are in the plot."""
    return {
        "governed": run.governed,
        "died": run.died,
        "kills": run.kills,
        "peak_bytes": run.peak_bytes,
        "answers": len(run.requests),
        "first_token_s": {kind: run.first_token_s(kind) for kind in KINDS},
        "return_prompt_n": [one.prompt_n for one in run.requests if one.kind == "return"],
    }


def _command(words: Sequence[str], port: int, *, governed: bool, place: str) -> list[str]:
    given = [word.replace("{port}", str(port)) for word in words]
    where = ["--place", place] if place else []
    ours = [sys.executable, "-m", "psi_kv_governor.cli", "exec", *where, "--"]
    return [*(ours if governed else []), *given]


def _play(words: Sequence[str], options: ServerOptions, *, governed: bool) -> Run:
    """One server, from start to end or death."""
    done, limit, port = Run(governed=governed), Sandbox(options.limit_mib << 20), free_port()
    begin_s, ended = time.monotonic(), threading.Event()

    def watch() -> None:
        while not ended.wait(SAMPLE_S):
            done.usage.append(Sample(time.monotonic() - begin_s, limit.group.usage_bytes()))

    watching = threading.Thread(target=watch)
    process = limit.popen(
        _command(words, port, governed=governed, place=options.place),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    watching.start()
    try:
        client = Client(port, done, begin_s)
        client.ready(process)
        conversations(client, Plan(options.talks, options.shots, options.talk_tokens, options.shot_tokens))
    except Dead as death:
        done.died = str(death)
    finally:
        ended.set()
        watching.join()
        done.kills = limit.group.oom_kills()
        done.peak_bytes = max((sample.usage_bytes for sample in done.usage), default=0)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        limit.close()
    return done


def _calm(
    words: Sequence[str], options: ServerOptions, recorder: Recorder[ServerOptions]
) -> Iterator[tuple[str, float]]:
    """Kinds of requests, and of each pair the ungoverned server's seconds over the governed one's. Who comes
    first alternates."""
    with contextlib.ExitStack() as ending:
        clients = [
            ending.enter_context(_standing(words, options, governed=governed)) for governed in (False, True)
        ]

        def ratio(kind: str, number: int, prompt: str) -> float:
            recorder.say(f"calm, {kind}, request {number} of {options.calm_pairs}")
            took_s = {}
            for side in (0, 1) if number % 2 else (1, 0):
                clients[side].ask(kind, number, prompt)
                took_s[side] = clients[side].run.requests[-1].seconds
            return took_s[0] / took_s[1]

        talks = [prompts("Talk", number, _CALM_TOKENS) for number in range(_CALM_TALKS)]
        for number in range(options.calm_pairs + 1):
            found = ratio("one-shot", number, prompts("Calm", number, _CALM_TOKENS))
            if number:  # the first finds cold pages
                yield "one-shot", found
        for number, talk in enumerate(talks):
            ratio("first", number, talk)
        for number in range(options.calm_pairs + 1):
            found = ratio("return", number, talks[number % _CALM_TALKS] + " And then")
            if number:
                yield "return", found


@contextlib.contextmanager
def _standing(words: Sequence[str], options: ServerOptions, *, governed: bool) -> Iterator[Client]:
    port = free_port()
    process = subprocess.Popen(
        _command(words, port, governed=governed, place=options.place),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        client = Client(port, Run(governed=governed), time.monotonic())
        client.ready(process)
        yield client
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()


def _figures(runs: Sequence[Run], ratios: Mapping[str, Sequence[float]]) -> Iterator[Figure]:
    for governed, case in ((False, "ungoverned"), (True, "governed")) if runs else ():
        these = [one for one in runs if one.governed is governed]
        kills = [float(one.kills) for one in these]
        yield figure("kills", "times", kills, NO_KILLS if governed else None, case=case)
        served = [float(len(one.requests)) for one in these]
        yield figure("answers", "times", served, case=case)
        yield figure("peak", "MB", [one.peak_bytes / 1e6 for one in these], case=case)
    alive = [one for one in runs if one.governed and not one.died]
    if runs:
        died = [float(bool(one.died)) for one in runs if one.governed]
        yield figure("runs that did not serve all", "runs", died, NO_KILLS, case="governed")
    if alive:
        sooner = [one.first_token_s("first") / one.first_token_s("return") for one in alive]
        yield figure("first token: computed over returning", "x", sooner, SOONER, case="governed")
    for kind, these_ratios in ratios.items():
        yield figure("throughput, governed over plain", "x", these_ratios, AS_FAST, case=f"with room, {kind}")


SCENE = Scene(
    about="A server in a container's limit, ungoverned and governed: who lives, and how soon a conversation "
    "that returns is answered.",
    options=ServerOptions(),
    quick=ServerOptions(
        repeats=1, limit_mib=320, talks=2, shots=2, talk_tokens=300, shot_tokens=50, calm_pairs=2
    ),
    run=run,
    examples=(
        "psi-kv bench server --quick",
        "psi-kv bench server --repeats 0 --calm-pairs 100",
        "psi-kv bench server --server 'llama-server -m MODEL -c 32768 --port {port}' --limit-mib 2000",
    ),
)
