"""`psi-kv park`: move what is not being used to a file, before memory is short."""

from __future__ import annotations

import click
import msgspec

from psi_kv_governor import socket_place
from psi_kv_governor.cli._governed import choose
from psi_kv_governor.cli._group import example
from psi_kv_governor.commands import Park, Unpark
from psi_kv_governor.status_client import ask


@click.command(
    "park",
    short_help="Park what a governed process does not use now.",
    epilog=example("psi-kv park 4711", "psi-kv park llama-server --sequence 3"),
)
@click.argument("process", metavar="PID|NAME")
@click.option("--sequence", type=click.IntRange(min=0), metavar="N", help="This one alone.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, a line for each model.")
def command(process: str, sequence: int | None, as_json: bool) -> None:
    """Park every sequence that is not being decoded, and the saved states. Nothing is lost: whoever goes on
    with one reads it back."""
    carry_out("park", process, Park(sequence=sequence), as_json)


def carry_out(verb: str, process: str, asked: Park | Unpark, as_json: bool) -> None:
    """Ask it of the process, and say what was done. Raises PsiKvError."""
    for one in choose(socket_place.find(), process):
        result = ask(one, asked).result
        if result is None:
            continue
        if as_json:
            click.echo(msgspec.json.encode(result))
            continue
        n_bytes = result.bytes_back if isinstance(asked, Unpark) else result.bytes_returned
        where = "back in memory" if isinstance(asked, Unpark) else "returned"
        problem = f" ({result.problem})" if result.problem else ""
        click.echo(f"psi-kv {verb}: {result.cells:,} cells, {n_bytes / 2**20:,.1f} MiB {where}{problem}")
