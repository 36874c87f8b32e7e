"""`psi-kv bench fidelity`: what the model still knows when a policy gave up a part of its context."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from psi_kv_governor import model as models
from psi_kv_governor.cli._group import INTERRUPTED, example
from psi_kv_governor.errors import BadInputError, PsiKvError

if TYPE_CHECKING:
    from psi_kv_governor.bench.fidelity.plan import Options
    from psi_kv_governor.bench.fidelity.results import FidelityReport

PLAIN_WIDTH = 120
"""Columns of the tables where the output is no terminal."""

_FILE = click.Path(path_type=Path)


@click.command(
    "fidelity",
    epilog=example(
        "psi-kv bench fidelity --quick",
        "psi-kv bench fidelity --policies window,hybrid --shares 0.5 --ctx 4096 --out-dir fidelity",
    ),
)
@click.option("--quick", is_flag=True, help="One text, 2,048 tokens, five policies: about three minutes.")
@click.option("--policies", metavar="NAMES", help="Comma-separated; random always joins in [all].")
@click.option("--shares", metavar="SHARES", help="Given up, 0 to 1, comma-separated [0.25,0.5,0.75].")
@click.option("--ctx", "lengths", metavar="TOKENS", help="Lengths of the context [2048,4096,6144].")
@click.option("--texts", metavar="NAMES", help="Comma-separated [all that this Python has].")
@click.option("--seed", type=int, default=0, show_default=True, help="Of random, and of what is hidden.")
@click.option("-m", "--model", type=_FILE, help="GGUF file [default: the demo model].")
@click.option("-t", "--threads", type=click.IntRange(min=1), help="Threads that decode [all cores].")
@click.option(
    "--cache",
    type=click.Choice(["f16", "q8_0", "q4_0"]),
    default="f16",
    show_default=True,
    help="Of the cells.",
)
@click.option(
    "--weights", type=click.Choice(["f32", "file"]), help="For the distributions [f32 up to 512 MiB]."
)
@click.option(
    "--only", metavar="PARTS", help="Of texts,steps,noise,spike,facts,chats,speed; put into FOLDER's report."
)
@click.option("--json", "as_json", is_flag=True, help="The whole report as JSON.")
@click.option("--out-dir", type=_FILE, metavar="FOLDER", help="Keep JSON, Markdown and plots in FOLDER.")
def command(**given: Any) -> None:
    """What is lost when a part of the context is given up, policy by policy, against the full cache.

    Next-token distributions, perplexity, hidden facts, chats, and answers after a spike. Exit status 1 when
    the default policy misses what is asked of it. Ctrl-C keeps what is finished: with --out-dir the same
    command goes on from there.
    """
    _run(**given)


def _run(*, as_json: bool, out_dir: Path | None, model: Path | None, **given: Any) -> None:
    from psi_kv_governor.bench.fidelity.plan import Options

    path = model or models.demo_model_path()
    models.check(path)
    options = Options(
        model=path,
        quick=given["quick"],
        policies=_split(given["policies"], str),
        shares=_split(given["shares"], _share),
        ctx=_split(given["lengths"], _tokens),
        texts=_split(given["texts"], str),
        seed=given["seed"],
        threads=given["threads"],
        cache=given["cache"],
        weights=given["weights"],
        only=_split(given["only"], str),
    )
    report = _measured(options, out_dir)
    if as_json:
        click.echo(report.to_json(), nl=False)
    else:
        _print(report)
    _end(report)


def _measured(options: Options, out_dir: Path | None) -> FidelityReport:
    """The report, with what `out_dir` holds already where only some parts are measured; kept there."""
    from psi_kv_governor.bench.fidelity.keeping import as_recorded, keep, recorded
    from psi_kv_governor.bench.fidelity.run import run
    from psi_kv_governor.bench.record import check_folder

    earlier = None
    if out_dir is not None:
        check_folder(out_dir)
        earlier = recorded(out_dir) if options.only else None
    with _progress() as watch:
        report = run(as_recorded(options, earlier) if earlier else options, watch, out_dir, earlier)
    if out_dir is not None:
        for written in keep(report, out_dir):
            click.echo(f"psi-kv bench fidelity: wrote {written}", err=True)
    return report


def _end(report: FidelityReport) -> None:
    if report.unfinished:
        click.echo(f"psi-kv bench fidelity: {report.unfinished}", err=True)
        raise click.exceptions.Exit(INTERRUPTED)
    if missed := [f"{found.name} ({found.case})" for found in report.figures if found.passed is False]:
        raise PsiKvError("missed: " + "; ".join(missed))


# -- input -------------------------------------------------------------------------------------------------


def _split(given: str | None, convert: Callable[[str], Any]) -> tuple[Any, ...]:
    words = [word.strip() for word in (given or "").split(",")]
    return tuple(convert(word) for word in words if word)


def _share(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise BadInputError(
            f"a share of {word!r} is not usable: give shares from 0 to 1, as 0.25,0.5"
        ) from None


def _tokens(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise BadInputError(
            f"a context of {word!r} is not usable: give whole numbers, as 2048,4096"
        ) from None


# -- output ------------------------------------------------------------------------------------------------


@contextmanager
def _progress() -> Iterator[Callable[[str, str, int, int], None]]:
    """A bar for each part on stderr; nothing where nobody looks."""
    console = Console(stderr=True)
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.fields[part]:<12}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        bars: dict[str, Any] = {}

        def watch(part: str, doing: str, done: int, total: int) -> None:
            if part not in bars:
                for bar in bars.values():
                    progress.update(bar, visible=False)
                bars[part] = progress.add_task(doing, total=total, part=part)
            progress.update(bars[part], description=doing, completed=done, total=total)

        yield watch


def _print(report: FidelityReport) -> None:
    terminal = sys.stdout.isatty()
    console = Console(
        width=None if terminal else PLAIN_WIDTH,
        force_terminal=terminal,
        color_system="auto" if terminal else None,
    )
    for table in (_policies(report), _targets(report)):
        if table.row_count:
            console.print(table)


def _policies(report: FidelityReport) -> Table:
    """One line a policy and share: what the plots show."""
    tasks = [task.name for task in report.tasks if task.able]
    table = Table(title="policy by policy", title_justify="left")
    for name in ("policy", "given up", "KL, nats", "top-1", "perplexity", *tasks, "chat"):
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    known = {(line.policy, line.share, line.task): line for line in report.retrieval if line.when == "known"}
    full = {task.name: task.full for task in report.tasks}
    chats = {(line.policy, line.share): line.right for line in report.conversation}
    for line in report.likelihood:
        if line.text or line.ctx:
            continue
        case = (line.policy, line.share)
        kept = [
            full[name]
            if line.policy == "full"
            else (found.all if (found := known.get((*case, name))) else None)
            for name in tasks
        ]
        table.add_row(
            line.policy,
            f"{line.share:.0%}" if line.share else "",
            f"{line.kl.mean:.4f}",
            f"{line.top1.mean:.1%}",
            f"{line.perplexity:.2f}",
            *(f"{share.mean:.0%}" if share else "" for share in (*kept, chats.get(case))),
            end_section=line.share == 0.0 and line.policy != "full",
        )
    return table


def _targets(report: FidelityReport) -> Table:
    from psi_kv_governor.bench.fidelity.targets import asked_words, judged, told

    table = Table(title="what is asked", title_justify="left")
    for name in ("", "asked", "measured", ""):
        table.add_column(name, justify="left" if not name else "right")
    for found in report.figures:
        passed = {True: "[green]pass[/]", False: "[bold red]FAIL[/]", None: ""}[found.passed]
        table.add_row(
            f"{found.name} ({found.case})", asked_words(found), told(judged(found), found.unit), passed
        )
    return table
