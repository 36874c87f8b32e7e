"""What `bench oom`, `bench capacity` and `bench latency` share: options, progress, tables, the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click
import msgspec
from rich.console import Console
from rich.table import Table

from psi_kv_governor import model as models
from psi_kv_governor.bench.record import Options, Say
from psi_kv_governor.errors import BadInputError, PsiKvError

if TYPE_CHECKING:
    from psi_kv_governor.bench.trials.keep import TrialsReport

PLAIN_WIDTH = 160
"""Columns of the tables where the output is no terminal."""
MIB = 1 << 20
_PLAIN_EVERY_S = 10.0
"""Between two lines of progress where the output is no terminal: a run of hours must not look dead."""

_FILE = click.Path(path_type=Path)
_OPTIONS = (
    click.option("--quick", is_flag=True, help="A short form for CI; other options change it."),
    click.option("--json", "as_json", is_flag=True, help="The whole report as JSON."),
    click.option("-m", "--model", type=_FILE, help="GGUF file [default: the demo model]."),
    click.option("-t", "--threads", type=click.IntRange(min=1), help="Threads that decode [1]."),
    click.option(
        "--out-dir", type=_FILE, metavar="FOLDER", help="Keep JSON, Markdown, CSV and a plot there."
    ),
    click.option("--resume", is_flag=True, help="Go on with what --out-dir holds."),
)
_S = TypeVar("_S", bound=msgspec.Struct)


class Bench(Protocol):
    """`run` of a benchmark."""

    def __call__(
        self, options: Options, asked: Any, folder: Path | None, say: Say, *, resume: bool
    ) -> TrialsReport: ...


def trial_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options that all three have."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def chosen(base: _S, **given: Any) -> _S:
    """`base` with what was given in its place. Raises BadInputError for what can't be used."""
    return type(base)(**{**msgspec.structs.asdict(base), **{k: v for k, v in given.items() if v is not None}})


def mib(value: int | None) -> int | None:
    """MiB in bytes."""
    return None if value is None else value * MIB


def numbers(text: str | None, what: str) -> tuple[float, ...] | None:
    """Numbers between commas. Raises BadInputError."""
    if text is None:
        return None
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise BadInputError(f"{what} {text!r} is not usable: give numbers separated by commas") from None


def play(
    bench: Bench,
    asked: Any,
    *,
    quick: bool,
    as_json: bool,
    model: Path | None,
    out_dir: Path | None,
    resume: bool,
) -> None:
    """Run it and show what came of it. Exit status 1 when a figure misses what was asked, 130 on Ctrl-C."""
    path = model or models.demo_model_path()
    models.check(path)
    with _progress() as say:
        report = bench(Options(model=path, quick=quick), asked, out_dir, say, resume=resume)
    if as_json:
        click.echo(report.to_json(), nl=False)
    else:
        _print(report)
    if report.interrupted:
        raise KeyboardInterrupt
    if missed := report.missed():
        from psi_kv_governor.bench.trials.keep import verdict

        raise PsiKvError("; ".join(verdict(found) for found in missed))


@contextmanager
def _progress() -> Iterator[Say]:
    """What is being done, on stderr: a line that changes on a terminal, else one every ten seconds."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("starting") as status:
            yield status.update
        return
    began_s = said_s = time.monotonic()

    def say(doing: str) -> None:
        nonlocal said_s
        if time.monotonic() - said_s >= _PLAIN_EVERY_S:
            said_s = time.monotonic()
            click.echo(f"{said_s - began_s:6.0f} s  {doing}", err=True)

    yield say


def _print(report: TrialsReport) -> None:
    from psi_kv_governor.bench.trials.keep import verdict

    terminal = sys.stdout.isatty()
    console = Console(
        width=None if terminal else PLAIN_WIDTH,
        force_terminal=terminal,
        color_system="auto" if terminal else None,
        highlight=False,
    )
    for found in report.tables:
        table = Table(title=found.title, title_justify="left")
        for place, name in enumerate(found.columns):
            table.add_column(name, justify="left" if place == 0 else "right")
        for row in found.rows:
            table.add_row(*row)
        console.print(table)
    for one in report.figures:
        colour = {True: "green", False: "bold red", None: "default"}[one.passed]
        console.print(verdict(one), style=colour, markup=False)
    for note in report.notes:
        console.print(f"- {note}", style="dim", markup=False)
