"""`psi-kv simulate`: the governor itself on a synthetic machine, or along a recorded trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from psi_kv_governor.cli._group import example, settings_given
from psi_kv_governor.cli._tables import table_console
from psi_kv_governor.config import GovernorConfig, load_config
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.simulation import SCENARIOS, Outcome, Track, get_scenario, replay, simulate
from psi_kv_governor.simulation.matrix import Comparison, Figures, run_matrix
from psi_kv_governor.simulation.plot import check_plotting, save_plot

Run = tuple[Outcome, Track]


@click.command(
    "simulate",
    short_help="Try the control law on a synthetic machine.",
    epilog=example(
        "psi-kv simulate",
        "psi-kv simulate --scenario spike --set high=0.2 --plot spike.png --seed 1",
        "psi-kv simulate --matrix --seconds 600",
    ),
)
@click.option(
    "--scenario",
    "names",
    multiple=True,
    metavar="NAME",
    help=f"{', '.join(SCENARIOS)}; again for more. [all]",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of the noise and the hostile neighbour."
)
@click.option("--seconds", type=float, default=120.0, show_default=True, help="Simulated time of a scenario.")
@click.option(
    "--ctx", type=click.IntRange(1, 1 << 20), default=4096, show_default=True, help="Cells of the context."
)
@click.option("--policy", metavar="NAME", help="Which blocks go first; see `psi-kv policies`.")
@click.option("--config", "file", type=click.Path(path_type=Path), metavar="FILE", help="A psi-kv.toml.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A setting; again for more.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the runs.")
@click.option("--json", "as_json", is_flag=True, help="Every figure and action as JSON.")
@click.option(
    "--trace", type=click.Path(path_type=Path), metavar="FILE", help="Replay a recorded trace instead."
)
@click.option("--matrix", is_flag=True, help="Many kinds of machine, each calm and busy, in one table.")
def command(  # noqa: PLR0917  (one parameter an option)
    names: tuple[str, ...],
    seed: int,
    seconds: float,
    ctx: int,
    policy: str | None,
    file: Path | None,
    settings: tuple[str, ...],
    plot: Path | None,
    as_json: bool,
    trace: Path | None,
    matrix: bool,
) -> None:
    """Run the governor itself against a synthetic machine, on a clock that is only counted.

    Each scenario is a neighbour that wants memory, against a limit that the cache is under as well; what
    the cache gives back, the machine has. The same seed gives the same output, byte for byte.
    """
    given: dict[str, object] = {**settings_given("--set", settings)}
    if policy:
        given["policy"] = policy
    config = load_config(file, default_file=True, **given)  # type: ignore[arg-type]  # any name is a setting
    if matrix:
        if names or trace is not None or plot is not None:
            raise BadInputError("--matrix has its own machines: leave --scenario, --trace and --plot out")
        _matrix(config, seed=seed, seconds=seconds, as_json=as_json)
        return
    if plot is not None:
        check_plotting(plot)
    if trace is not None:
        if names:
            raise BadInputError("give --scenario or --trace, not both: a trace brings its own pressure")
        runs = [_replayed(trace, config, ctx)]
    else:
        scenarios = [get_scenario(name) for name in names or SCENARIOS]
        runs = [simulate(scenario, config, seed=seed, seconds=seconds, ctx=ctx) for scenario in scenarios]
    if plot is not None:
        save_plot(plot, runs, config)
    outcomes = [outcome for outcome, _ in runs]
    if as_json:
        click.echo(_json(outcomes, config, seed=None if trace else seed, ctx=ctx))
    else:
        _print_tables(outcomes, config)


def _replayed(trace: Path, config: GovernorConfig, ctx: int) -> Run:
    from psi_kv_governor.pressure.trace import read_trace

    return replay(trace.name, read_trace(trace), config, ctx=ctx)


def _matrix(config: GovernorConfig, *, seed: int, seconds: float, as_json: bool) -> None:
    with Console(stderr=True).status("") as status:
        rows = run_matrix(config, seed=seed, seconds=seconds, tell=status.update)
    if as_json:
        report = {"seed": seed, "seconds": seconds, "config": config, "machines": rows}
        click.echo(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        click.echo("\n".join(matrix_lines(rows)))


def matrix_lines(rows: Sequence[Comparison]) -> Iterator[str]:
    """The table in Markdown, as it stands in the documentation."""
    yield "| machine | | trims | restores | written, GB/h | lost, s: without → with | killed |"
    yield "| --- | --- | --: | --: | --: | --: | --: |"
    for row in rows:
        one: Figures = row.governed
        about = f" ({row.about})" if row.about and row.state == "calm" else ""
        yield (
            f"| {row.machine}{about} | {row.state} | {one.trims} | {one.restores} "
            f"| {one.written_bytes_per_h / 1e9:.1f} | {row.ungoverned.lost_s:.1f} → {one.lost_s:.1f} "
            f"| {row.ungoverned.kills} → {one.kills} |"
        )


def _json(outcomes: Sequence[Outcome], config: GovernorConfig, *, seed: int | None, ctx: int) -> str:
    report = {"seed": seed, "ctx": ctx, "config": config, "scenarios": outcomes}
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode()


def _print_tables(outcomes: Sequence[Outcome], config: GovernorConfig) -> None:
    console = table_console()
    for outcome in outcomes:
        console.print(_table(outcome, config))


def _table(outcome: Outcome, config: GovernorConfig) -> Table:
    title = Text.assemble((outcome.scenario, "bold"), f": {outcome.about}")
    table = Table(title=title, title_justify="left", title_style="", min_width=72)
    table.add_column("", no_wrap=True)
    table.add_column("governed", justify="right")
    if outcome.stall_ungoverned_s is not None:
        table.add_column("ungoverned", justify="right")
    for name, *values in _rows(outcome, config):
        table.add_row(name, *values[: len(table.columns) - 1])
    return table


def _rows(outcome: Outcome, config: GovernorConfig) -> Iterator[tuple[str, ...]]:
    """The lines of a table: the figure's name, with the governor, and where it is told without."""
    yield "time", f"{outcome.seconds:g} s"
    yield "lost to stalls", _lost(outcome, outcome.stall_s), _lost(outcome, outcome.stall_ungoverned_s)
    if outcome.tokens is not None:
        yield "tokens decoded", f"{outcome.tokens:,}", f"{outcome.tokens_ungoverned:,}"
    first = outcome.first_action_after_s
    onset = "never short" if outcome.onset_s is None else f"short at {outcome.onset_s:.2f} s"
    yield "time to first action", onset if first is None else f"{first:.2f} s ({onset})"
    yield "trims", f"{outcome.trims}"
    yield "cells given up", f"{outcome.cells_given_up:,}"
    yield "most in 60 s", f"{outcome.most_given_up_per_min:.2f} of {config.budget_per_min:g} contexts"
    yield "bytes written", f"{outcome.written_bytes / 2**20:,.1f} MiB"
    yield "bytes returned", f"{outcome.bytes_returned / 2**20:,.1f} MiB"
    yield "restores", f"{outcome.restores} ({outcome.cells_restored:,} cells)"
    yield "missing at the end", f"{outcome.missing_cells:,} cells"
    yield "minimum live share", f"{outcome.min_live_share:.1%}"
    yield "direction changes", f"{outcome.direction_changes}"


def _lost(outcome: Outcome, stall_s: float | None) -> str:
    if stall_s is None:
        return ""
    share = stall_s / outcome.seconds if outcome.seconds else 0.0
    return f"{stall_s:.2f} s ({share:.1%})"
