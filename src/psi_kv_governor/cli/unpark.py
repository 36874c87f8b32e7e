"""`psi-kv unpark`: read parked sequences back before somebody needs them."""

from __future__ import annotations

import click

from psi_kv_governor.cli._group import example
from psi_kv_governor.cli.park import carry_out
from psi_kv_governor.commands import Unpark


@click.command(
    "unpark",
    short_help="Read back what a governed process has parked.",
    epilog=example("psi-kv unpark 4711", "psi-kv unpark llama-server --sequence 3"),
)
@click.argument("process", metavar="PID|NAME")
@click.option("--sequence", type=click.IntRange(min=0), metavar="N", help="This one alone.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, a line for each model.")
def command(process: str, sequence: int | None, as_json: bool) -> None:
    """Read parked sequences back into memory, so that the next request does not wait for the disk."""
    carry_out("unpark", process, Unpark(sequence=sequence), as_json)
