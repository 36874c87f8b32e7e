"""`psi-kv exec`: a llama.cpp program governed as it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from psi_kv_governor.cli._group import example, settings_given
from psi_kv_governor.config import load_config
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.service.program import HeldSignals, end_as

if TYPE_CHECKING:
    from psi_kv_governor.service.exec import Prepared


@click.command(
    "exec",
    short_help="Run llama-server, Ollama or any llama.cpp program under the governor.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=example(
        "psi-kv exec -- llama-server -m model.gguf -c 32768",
        "psi-kv exec -- ollama serve",
        "psi-kv exec --place /var/lib/psi-kv -- python app.py",
        "psi-kv exec --dry-run -- llama-server -m model.gguf",
        "psi-kv exec --pid 4711",
    ),
)
@click.option(
    "--place", metavar="FOLDER", help="Where context is parked: a folder on a disk [found by itself]."
)
@click.option(
    "--backing",
    type=click.Choice(["auto", "file", "memory"]),
    help="Where caches live from the start [auto: in a file where there is no swap].",
)
@click.option(
    "--set", "given", multiple=True, metavar="KEY=VALUE", help="Any other setting; may be repeated."
)
@click.option("--config", "file", type=click.Path(path_type=Path), metavar="FILE", help="A psi-kv.toml.")
@click.option(
    "--pid",
    type=click.IntRange(min=1),
    help="Govern again a program of psi-kv exec whose governor was killed; park any other once.",
)
@click.option(
    "--metrics", metavar="[HOST:]PORT", help="Serve figures for Prometheus [off; this machine alone]."
)
@click.option("--dashboard", metavar="[HOST:]PORT", help="Serve a page to look at and to act by [off].")
@click.option("--dry-run", is_flag=True, help="Say what would be started and reached, and start nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: as JSON.")
@click.argument("program", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def command(  # noqa: PLR0917
    ctx: click.Context,
    place: str | None,
    backing: str | None,
    given: tuple[str, ...],
    file: Path | None,
    pid: int | None,
    metrics: str | None,
    dashboard: str | None,
    dry_run: bool,
    as_json: bool,
    program: tuple[str, ...],
) -> None:
    """Run PROGRAM with its arguments, and give its memory back while the machine is short of it.

    No flag, patch or recompiling: the program, and whatever it starts, finds the agent in front of llama.cpp.
    Its terminal, its signals and its exit status are its own. Where something is missing it runs as it would
    without us, and one line says why.
    """
    if (pid is None) == (not program):
        raise BadInputError("say which program to run (psi-kv exec -- PROGRAM [ARGS]), or --pid alone")
    overrides: dict[str, Any] = {**settings_given("--set", given)}
    with HeldSignals() as held:  # before numpy is imported, which starts threads
        from psi_kv_governor.service import exec as service
        from psi_kv_governor.service.beside import asked_for

        config = load_config(file, default_file=True, place=place, backing=backing, **overrides)
        if pid is not None:
            service.attach(pid, config, held, beside=asked_for(metrics, dashboard))
            return
        if dry_run:
            _show(service.prepare(program, config, os.environ), as_json)
            return
        status = service.run(program, config, held, beside=asked_for(metrics, dashboard))
        held.forget()
    ctx.exit(end_as(status))


def _show(prepared: Prepared, as_json: bool) -> None:
    why = "another psi-kv exec governs it already" if prepared.inside else prepared.why_not
    told = {
        "program": str(prepared.path),
        "governed": not why,
        "why_not": why,
        "reached": prepared.reach.level.value,
        "how": prepared.reach.how,
        "agent": prepared.agent,
        "place": prepared.chosen.folder,
        "backing": prepared.chosen.backing,
        "why_backing": prepared.chosen.why,
    }
    if as_json:
        click.echo(msgspec.json.encode(told))
        return
    for name, value in told.items():
        click.echo(f"{name:<12} {'yes' if value is True else 'no' if value is False else value or '-'}")
