"""`psi-kv bench`: the figures that the governor is held against, measured on this machine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from psi_kv_governor import model as models
from psi_kv_governor.bench.record import Figure, Options, Report, Say, check_writable, save
from psi_kv_governor.cli import bench_capacity, bench_fidelity, bench_latency, bench_oom, bench_pressure
from psi_kv_governor.cli._group import NearestGroup, example
from psi_kv_governor.errors import PsiKvError

PLAIN_WIDTH = 120
"""Columns of the tables where the output is no terminal."""

_FILE = click.Path(path_type=Path)
_OPTIONS = (
    click.option("--quick", is_flag=True, help="Under three minutes on two cores."),
    click.option("--json", "as_json", is_flag=True, help="The whole report as JSON."),
    click.option("-m", "--model", type=_FILE, help="GGUF file [default: the demo model]."),
    click.option("-t", "--threads", type=click.IntRange(min=1), help="Threads that decode."),
    click.option("--repeats", type=click.IntRange(min=1), help="How often each thing is measured."),
    click.option("--out", type=_FILE, metavar="FILE", help="Keep the JSON report in FILE."),
)


def _bench_options(function: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@click.group(
    "bench",
    cls=NearestGroup,
    short_help="Measure the governor on this machine.",
    epilog=example("psi-kv bench trim --quick", "psi-kv bench overhead --json --out overhead.json"),
)
def command() -> None:
    """Measure what is promised, beside what is asked. Exit status 1 when a figure misses it.

    Timings are compared within one session, by turns; run them on a quiet machine.
    """


@command.command("trim", epilog=example("psi-kv bench trim --quick"))
@_bench_options
def trim(**given: Any) -> None:
    """What a trim returns and how fast, that no bit of the logits changes, and what coming back costs."""
    _run("trim", **given)


@command.command("overhead", epilog=example("psi-kv bench overhead --quick"))
@_bench_options
def overhead(**given: Any) -> None:
    """Decode speed on a calm machine against plain llama_cpp.Llama, by turns."""
    _run("overhead", **given)


@command.command("opening", epilog=example("psi-kv bench opening --quick"))
@_bench_options
def opening(**given: Any) -> None:
    """Memory of a large context before and while tokens come into it."""
    _run("opening", **given)


@command.command("policies", epilog=example("psi-kv bench policies --quick"))
@_bench_options
def policies(**given: Any) -> None:
    """What scoring a context by its keys and sampling attention cost, over one decoded token."""
    _run("policy_cost", **given)


@command.command("soak", epilog=example("psi-kv bench soak --quick"))
@_bench_options
def soak(**given: Any) -> None:
    """What the governor itself costs: processor time when calm, memory, and growth over half an hour."""
    _run("soak", **given)


command.add_command(bench_fidelity.command)
command.add_command(bench_oom.command)
command.add_command(bench_capacity.command)
command.add_command(bench_latency.command)
command.add_command(bench_pressure.command)


def _run(
    module: str,
    *,
    quick: bool,
    as_json: bool,
    model: Path | None,
    threads: int | None,
    repeats: int | None,
    out: Path | None,
) -> None:
    path = model or models.demo_model_path()
    models.check(path)
    if out is not None:
        check_writable(out)
    measure = import_module(f"psi_kv_governor.bench.{module}").run
    with _progress() as say:
        report: Report = measure(Options(model=path, quick=quick, threads=threads, repeats=repeats), say)
    if out is not None:
        save(report, out)
    if as_json:
        click.echo(report.to_json(), nl=False)
    else:
        _print(report)
    if missed := report.missed():
        raise PsiKvError("missed: " + "; ".join(map(_missed_words, missed)))


@contextmanager
def _progress() -> Iterator[Say]:
    """A line on the terminal that says what is being done, on stderr; nothing where nobody looks."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda doing: None
        return
    with console.status("starting") as status:
        yield status.update


def _print(report: Report) -> None:
    terminal = sys.stdout.isatty()
    console = Console(
        width=None if terminal else PLAIN_WIDTH,
        force_terminal=terminal,
        color_system="auto" if terminal else None,
    )
    console.print(_table(report.figures))
    header = report.header
    threads = " and ".join(map(str, header.threads))
    console.print(
        f"{header.model}, {threads} of {header.machine.cores} cores, {header.machine.processor}, "
        f"{header.machine.kernel}, llama-cpp-python {header.versions.get('llama-cpp-python', 'is missing')}; "
        f"load {header.load_before:.2f} before and {header.load_after:.2f} after",
        highlight=False,
    )


def _table(figures: Sequence[Figure]) -> Table:
    table = Table(title_justify="left", min_width=72)
    for name in ("", "asked", "measured", "min to max", ""):
        table.add_column(name, justify="left" if not name else "right", no_wrap=bool(name))
    case = ""
    for found in figures:
        if found.case != case:
            case = found.case
            table.add_section()
            table.add_row(f"[bold]{case}[/]")
        passed = {True: "[green]pass[/]", False: "[bold red]FAIL[/]", None: ""}[found.passed]
        spread = f"{_told(found.min, found.unit)} to {_told(found.max, found.unit)}"
        table.add_row(
            f"  {found.name}" if case else found.name,
            _asked_words(found),
            f"{_told(_judged(found), found.unit)} {_shown_unit(found.unit)}".strip(),
            spread if len(found.values) > 1 else "",
            passed,
        )
    return table


def _judged(found: Figure) -> float:
    """The statistic that is held against what was asked; the median where nothing was."""
    value: float = getattr(found, found.asked.statistic if found.asked else "median")
    return value


def _missed_words(found: Figure) -> str:
    case = f" ({found.case})" if found.case else ""
    measured = f"{_told(_judged(found), found.unit)} {_shown_unit(found.unit)}".strip()
    return f"{found.name}{case} is {measured}, asked {_asked_words(found)}"


def _asked_words(found: Figure) -> str:
    return f"{found.asked.sign} {_told(found.asked.bound, found.unit)}" if found.asked else ""


def _shown_unit(unit: str) -> str:
    return "" if unit == "share" else unit


def _told(value: float, unit: str) -> str:
    """Whole numbers for what is counted, percent for shares, else four figures."""
    if unit in {"logits", "runs", "cells"}:
        return f"{value:,.0f}"
    if unit == "share":
        return f"{value:.1%}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
