"""`psi-kv record`: the readings of this machine and the law's answers, for a simulated cache, in a file."""

from __future__ import annotations

import math
import time
from contextlib import closing, suppress
from pathlib import Path

import click
import msgspec
from rich.console import Console

from psi_kv_governor.cli._group import example
from psi_kv_governor.cli._options import cell_bytes_option
from psi_kv_governor.cli.session import ended_by_sigterm
from psi_kv_governor.config import load_config
from psi_kv_governor.control import Action, Turn
from psi_kv_governor.engines.simulated import SimulatedEngine
from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.governor import Governor
from psi_kv_governor.recording import Recorder

_LOOK_S = 0.2
"""How often it is looked whether the time is over: the governor has a thread of its own."""


@click.command(
    "record",
    short_help="Record this machine's memory pressure.",
    epilog=example(
        "psi-kv record evening.jsonl",
        "psi-kv record build.jsonl --seconds 600 --cells 8192",
        "psi-kv replay build.jsonl --what-if high=0.2",
    ),
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-s", "--seconds", type=click.FloatRange(min=0, min_open=True), help="How long [default: until Ctrl-C]."
)
@click.option(
    "--cells",
    type=click.IntRange(1, 1 << 20),
    default=4096,
    show_default=True,
    help="Size of the simulated cache.",
)
@cell_bytes_option
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), metavar="FILE", help="A psi-kv.toml."
)
@click.option("--json", "as_json", is_flag=True, help="Say at the end as JSON what was recorded.")
def command(  # noqa: PLR0917  (one parameter an option)
    file: Path, seconds: float | None, cells: int, cell_bytes: int, config_file: Path | None, as_json: bool
) -> None:
    """Watch this machine and write to FILE (JSON Lines) what it is like and what the law decides.

    The governor runs on a full cache that is only simulated: nothing is trimmed for real. FILE says what sort
    of machine it was and nothing of whose. An hour takes 2 MB on a calm machine and 20 MB on a busy one. To
    record a real run: `psi-kv run --record FILE`.
    """
    if seconds is not None and math.isnan(seconds):
        raise BadInputError("--seconds nan is no length of time: give seconds")
    config = load_config(config_file, default_file=True)
    engine = SimulatedEngine()
    engine.add_cache(cells, cell_bytes=cell_bytes).sequence(0).running = True  # as while it answers
    engine.decode(cells)
    recorder = Recorder(file, config)
    count = Count()
    with ended_by_sigterm(), closing(recorder):
        governor = Governor(engine, config=config, name="psi-kv record")
        with closing(governor):
            governor.observe(recorder)  # before its first turn: a replay begins where the law began
            governor.observe(count)
            governor.start()
            watch(recorder, count, seconds)
    if not count.turns and not recorder.problem:
        raise PsiKvError(f"no turn came while it was recorded, and {file} was not written: give it longer")
    if as_json:
        report = {"file": str(file), "turns": recorder.turns, "seconds": round(count.seconds, 3)}
        click.echo(msgspec.json.encode({**report, "trims": count.trims}))
    else:
        click.echo(f"psi-kv: {count.words()}; in {file}", err=True)
    if recorder.problem:
        raise PsiKvError(recorder.problem)


class Count:
    """What was recorded so far. Use it as an observer."""

    def __init__(self) -> None:
        self.turns = self.trims = 0
        self.seconds = 0.0
        self._first_s: float | None = None

    def __call__(self, turn: Turn) -> None:
        now_s = turn.reading.time_s
        self._first_s = now_s if self._first_s is None else self._first_s
        self.seconds = now_s - self._first_s
        self.turns += 1
        self.trims += turn.decision.action is Action.TRIM

    def words(self) -> str:
        """One clause."""
        trims = f"{self.trims} trim{'' if self.trims == 1 else 's'} decided"
        return f"{self.turns} turns in {self.seconds:.0f} s, {trims}"


def watch(recorder: Recorder, count: Count, seconds: float | None) -> None:
    """Until the time is over, the file can't be written any more, or Ctrl-C, which is how it ends by hand."""
    end_s = math.inf if seconds is None else time.monotonic() + seconds
    with suppress(KeyboardInterrupt), Console(stderr=True).status("recording, Ctrl-C ends it") as status:
        while not recorder.problem and (left_s := end_s - time.monotonic()) > 0:
            time.sleep(min(_LOOK_S, left_s))
            status.update(f"recording, Ctrl-C ends it: {count.words()}")
