"""The daily death of a server in a container: one-shot prompts and returning conversations within a limit.

The server is somebody else's: `xllamacpp` by default, or a command with {port} in it. Ungoverned and governed
runs alternate; what it costs while nothing is short is asked of two servers side by side, by turns.
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

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
    SILENT,
    Client,
    Dead,
    Run,
    Sample,
    command,
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
    ratios: dict[str, list[float]] = {}

    def one(what: tuple[int, bool]) -> Run:
        recorder.say(f"run {what[0]} of {options.repeats}, {'governed' if what[1] else 'ungoverned'}")
        return _play(words, options, governed=what[1])

    order = [(number + 1, governed) for number in range(options.repeats) for governed in (False, True)]
    journal.play(order[len(journal.parts) :], one)
    interrupted = journal.interrupted
    try:
        for kind, ratio in _calm(words, options, recorder) if options.calm_pairs and not interrupted else ():
            ratios.setdefault(kind, []).append(ratio)
    except KeyboardInterrupt:
        interrupted = True
    runs: list[Run] = journal.parts
    if not runs and not ratios:
        raise PsiKvError("interrupted before the first run was finished: there is nothing to report")
    report = recorder.report(
        list(_figures(runs, ratios)),
        [options.threads or 1],
        interrupted=interrupted,
        rows=[_short(one) for one in runs],
    )
    draw = [partial(plot, runs=runs[-2:], limit_bytes=options.limit_mib << 20)] if runs else []
    return recorder.save(report, (), *draw)


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


def _play(words: Sequence[str], options: ServerOptions, *, governed: bool) -> Run:
    """One server, from start to end or death."""
    done, begin_s, ended = Run(governed=governed), time.monotonic(), threading.Event()
    with Sandbox(options.limit_mib << 20) as limit:

        def watch() -> None:
            while not ended.wait(SAMPLE_S):
                done.usage.append(Sample(time.monotonic() - begin_s, limit.group.usage_bytes()))

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            with _serving(words, options, done, begin_s, limit.popen) as client:
                _conversations(client, options)
        except Dead as death:
            done.died = str(death)
        finally:
            ended.set()
            watching.join()
        done.kills = limit.group.oom_kills()
        done.peak_bytes = max((sample.usage_bytes for sample in done.usage), default=0)
    return done


def _conversations(client: Client, options: ServerOptions) -> None:
    """Conversations begin, one-shot prompts come in between, and the conversations return. Raises Dead."""
    between = max(1, options.shots // options.talks)
    stories = [prompts("Story", number, options.talk_tokens) for number in range(options.talks)]
    for number, story in enumerate(stories):
        client.ask("first", number, story)
    for number in range(options.shots):
        client.ask("one-shot", number, prompts("Question", number, options.shot_tokens))
        if number % between == between - 1:
            returning = number // between % options.talks
            client.ask("return", returning, stories[returning] + " And then")


def _calm(
    words: Sequence[str], options: ServerOptions, recorder: Recorder[ServerOptions]
) -> Iterator[tuple[str, float]]:
    """Kinds of requests, and of each pair the ungoverned server's seconds over the governed one's. Who comes
    first alternates."""
    with contextlib.ExitStack() as ending:
        clients = [
            ending.enter_context(_serving(words, options, Run(governed=governed), time.monotonic()))
            for governed in (False, True)
        ]

        def ratio(kind: str, number: int, prompt: str) -> float:
            recorder.say(f"calm, {kind}, request {number} of {options.calm_pairs}")
            for client in clients if number % 2 else clients[::-1]:
                client.ask(kind, number, prompt)
            plain, governed = (client.run.requests[-1].seconds for client in clients)
            return plain / governed

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
def _serving(
    words: Sequence[str], options: ServerOptions, run: Run, begin_s: float, start: Any = subprocess.Popen
) -> Iterator[Client]:
    """A server that is ready, and is ended afterwards. Raises Dead."""
    port = free_port()
    process = start(command(words, port, governed=run.governed, place=options.place), **SILENT)
    try:
        client = Client(port, run, begin_s)
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
