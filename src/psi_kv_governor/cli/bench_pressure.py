"""`psi-kv bench pressure`: one scene under one load, fixed, by the reference method and governed by turns."""

from __future__ import annotations

import contextlib
import datetime
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console
from rich.table import Table

from psi_kv_governor.bench.messages import Variant
from psi_kv_governor.bench.pen import Swap
from psi_kv_governor.bench.pressure import table
from psi_kv_governor.bench.pressure.folder import default_folder
from psi_kv_governor.bench.pressure.options import VARIANTS, Isolate, Order, PressureOptions
from psi_kv_governor.bench.pressure.play import Benchmark
from psi_kv_governor.bench.pressure.preflight import check_memory, checks, demand
from psi_kv_governor.bench.pressure.report import save_plots
from psi_kv_governor.bench.pressure.result import PressureResult
from psi_kv_governor.bench.pressure.setting import choose_setting
from psi_kv_governor.bench.script import LoadKind
from psi_kv_governor.cli._group import example
from psi_kv_governor.cli._scene_view import SceneView
from psi_kv_governor.cli.session import ended_by_sigterm
from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.model import demo_model_path
from psi_kv_governor.preflight import Check

PLAIN_WIDTH = 190
"""Columns of the tables where the output is no terminal: one line a run."""

_TITLES: dict[Variant, str] = {variant: variant for variant in VARIANTS}
_DEFAULTS = PressureOptions(model="")
_FILE = click.Path(path_type=Path)
_Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def _variants(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in VARIANTS:
            raise click.BadParameter(f"{name!r} is none of {', '.join(VARIANTS)}")
    return names


def _number(*names: str, text: str, kind: type = int) -> _Decorator:
    field = names[-1].removeprefix("--").replace("-", "_")
    return click.option(*names, type=kind, default=getattr(_DEFAULTS, field), show_default=True, help=text)


def _choice(name: str, kind: Any, text: str) -> _Decorator:
    field = name.removeprefix("--").replace("-", "_")
    choice = click.Choice(get_args(kind))
    return click.option(name, type=choice, default=getattr(_DEFAULTS, field), show_default=True, help=text)


@click.command(
    "pressure",
    epilog=example(
        "psi-kv bench pressure --preflight-only",
        "psi-kv bench pressure",
        "psi-kv bench pressure --variant-order random --repeats 7 --out-dir out/random",
        "psi-kv bench pressure --load ramp --pressure-rate-mib-s 50 --swap none",
        "psi-kv bench pressure --pressure-mib 0 -n 400 --variants fixed,psi",
    ),
)
@_number("-c", "--ctx-size", text="Cells of the cache.")
@_number("-n", "--n-predict", text="Tokens decoded under pressure.")
@click.option("--prompt-tokens", type=int, help="Tokens before that [default: what fits].")
@_number("--keep", text="First tokens that never go (reference, psi).")
@_number("--tail", text="Last tokens that never go (reference, psi).")
@_number("--min-prune", text="The reference never removes fewer tokens.")
@_choice("--load", LoadKind, "What the neighbour does: touches memory, reads files, takes memory at a rate.")
@_number("--pressure-mib", text="What it takes or reads; 0: no neighbour.")
@_number("--pressure-step-mib", text="How much at a time (memory, files).")
@_number("--pressure-rate-mib-s", text="How fast (ramp); 0: as fast as it can.", kind=float)
@_number("--pressure-warmup-s", text="It works so long before the model decodes.", kind=float)
@click.option(
    "--variants", callback=_variants, default=",".join(VARIANTS), show_default=True, help="Which of them."
)
@_choice("--variant-order", Order, "Within each repeat; random draws anew for each.")
@_number("--variant-cooldown-s", text="Pause between two runs.", kind=float)
@_number("--repeats", text="Runs of each variant.")
@_choice("--isolate", Isolate, "A memory cgroup for each run; host presses nothing.")
@click.option(
    "--memory-limit-mib", type=int, help="Of that cgroup [default: cache and load do not both fit]."
)
@_choice("--swap", Swap, "In that cgroup: a zram device of its own, none, the machine's.")
@_number("-t", "--threads", text="Threads that decode.")
@_number("--seed", text="Of the random order, and of what fills the neighbour's memory.")
@click.option("-m", "--model", type=_FILE, help="GGUF file [default: the demo model].")
@click.option("--out-dir", type=_FILE, help="New folder for the report [default: out/pressure-<time>].")
@click.option("--preflight-only", is_flag=True, help="Only say whether it can be run here.")
@click.option("--json", "as_json", is_flag=True, help="Print result.json.")
def command(
    model: Path | None, out_dir: Path | None, preflight_only: bool, as_json: bool, **given: Any
) -> None:
    """A model decodes while a neighbour takes memory: fixed cache, reference method, governor.

    Each run has a memory cgroup and a swap device of its own, which are gone at the end, however it comes.
    Needs root or a delegated cgroup. Keeps result.json, samples.csv, summary.md and plots; Ctrl-C keeps the
    runs that are finished. Exit status 1 when a figure misses what is asked.
    """
    folder = out_dir or default_folder(datetime.datetime.now().astimezone())
    options = PressureOptions(model=str(_model(model, preflight_only)), **given)
    with ended_by_sigterm():
        if preflight_only:
            _preflight(options, folder, as_json)
            return
        for found in checks(options, folder):
            demand(found)
        result = _measure(options, folder)
    if as_json:
        click.echo(result.to_json(), nl=False)
    else:
        _print(result)
        click.echo(f"kept in {folder}")
    if missed := [found.name for found in result.report.missed()]:
        raise PsiKvError(f"missed: {'; '.join(missed)}")


def _model(given: Path | None, preflight_only: bool) -> Path:
    """The model's file. A preflight says itself that the demo model is not here."""
    if given is not None:
        return given
    try:
        return demo_model_path()
    except PsiKvError as error:
        if preflight_only:
            return Path("the demo model (psi-kv model fetch)")
        raise BadInputError(str(error)) from error


def _measure(options: PressureOptions, folder: Path) -> PressureResult:
    titles = {variant: _TITLES[variant] for variant in VARIANTS if variant in options.variants}
    with SceneView(titles, f"the report goes to {folder}") as view:
        if options.memory_limit_mib is None:
            view.say("measuring what the model takes")
        setting = choose_setting(options)
        demand(check_memory(setting))
        benchmark = Benchmark(options, setting, folder)

        def begin(number: int, of: int, variant: Variant) -> None:
            view.forget(variant)
            view.say(f"run {number} of {of}: {variant}")

        try:
            result = benchmark.play(view, begin)
        except BaseException:
            _keep(benchmark, folder, view)
            raise
        view.say("drawing the plots")
        save_plots(folder, result)
    return result


def _keep(benchmark: Benchmark, folder: Path, view: SceneView) -> None:
    """What was finished is on the disk already; draw it, and say so."""
    if benchmark.finished:
        with contextlib.suppress(PsiKvError):  # what ended the benchmark is the error to be told
            save_plots(folder, benchmark.result(complete=False))
        view.say(f"{benchmark.finished} finished runs are kept in {folder}")


def _preflight(options: PressureOptions, folder: Path, as_json: bool) -> None:
    """A line on each thing. Exit status 1 where the benchmark can't be run."""
    found = list(checks(options, folder))
    if not any(check.state == "fail" for check in found):
        found.append(check_memory(choose_setting(options)))
    if as_json:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2))
    else:
        for check in found:
            click.echo(_check_line(check))
    if any(check.state == "fail" for check in found):
        click.get_current_context().exit(1)


def _check_line(check: Check) -> str:
    todo = f" -> {check.remedy}" if check.remedy else ""
    return f"{check.state:4}  {check.name:8} {check.detail}{todo}"


def _print(result: PressureResult) -> None:
    """The runs, their medians, and what was asked."""
    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else PLAIN_WIDTH, color_system="auto" if terminal else None)
    _print_table(console, table.COLUMNS, [table.row(run) for run in result.runs])
    _print_table(console, *table.medians(result))
    compared = [[found.name, table.spread(found)] for found in table.ratios(result)]
    if compared:
        _print_table(console, ["ratios within a repeat", "median (min to max)"], compared)
    for line in [*result.remarks, *table.verdicts(result), *table.circumstances(result)]:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _print_table(console: Console, head: Any, rows: list[list[str]]) -> None:
    shown = Table()
    for place, name in enumerate(head):
        shown.add_column(name, justify="right" if place > 1 else "left")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
