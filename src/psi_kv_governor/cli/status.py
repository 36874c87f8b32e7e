"""`psi-kv status`: how the governed processes of this user stand now."""

from __future__ import annotations

import click
import msgspec
from rich.console import Console
from rich.text import Text

from psi_kv_governor import socket_place
from psi_kv_governor.cli._governed import choose, program
from psi_kv_governor.cli._group import example
from psi_kv_governor.cli._watch_view import cache_lines, limit_words, plain_line
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.status_client import told


@click.command(
    "status",
    short_help="See how the governed processes stand.",
    epilog=example("psi-kv status", "psi-kv status llama-server --json"),
)
@click.argument("process", metavar="[PID|NAME]", required=False)
@click.option("--json", "as_json", is_flag=True, help="A line of JSON for each.")
def command(process: str | None, as_json: bool) -> None:
    """Show every governed process of this user, or one: its mode, its caches and their sequences."""
    console = Console(highlight=False, soft_wrap=True)
    found = socket_place.find()
    chosen = choose(found, process)
    asked, untold = found if process is None else chosen, []
    for one in asked:
        try:
            update = told(one)
        except PsiKvError as error:  # of another version, or stopped: the others are shown all the same
            untold.append(error)
            continue
        if as_json:
            click.echo(msgspec.json.encode({"pid": one.pid, "status": update.status}))
            continue
        name = update.status.name or program(one.pid)
        limit = limit_words(update.status)
        console.print(Text.assemble((f"{one.pid} {name}", "bold"), f"  {plain_line(update)}; limit: {limit}"))
        for line in cache_lines(update.status, update.time_s):
            console.print(line)
    if untold and len(untold) == len(asked):
        raise untold[0]
    for why in untold:
        click.echo(f"psi-kv: {why}", err=True)
