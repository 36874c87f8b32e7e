"""`psi-kv limit`: how much a governed process may hold of its caches under pressure."""

from __future__ import annotations

import re

import click
import msgspec

from psi_kv_governor import socket_place
from psi_kv_governor.cli._governed import choose
from psi_kv_governor.cli._group import example
from psi_kv_governor.commands import Limit
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.status_client import ask

_UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt])i?b?", re.IGNORECASE)


@click.command(
    "limit",
    short_help="Limit what a governed process holds under pressure.",
    epilog=example("psi-kv limit 4711 2GiB", "psi-kv limit llama-server 0.5", "psi-kv limit 4711 none"),
)
@click.argument("process", metavar="PID|NAME")
@click.argument("amount", metavar="2GiB|0.5|none")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(process: str, amount: str, as_json: bool) -> None:
    """From now on, while memory is short, all caches of the process together hold at most this much: an
    amount with its unit (2GiB), a share of what they hold (0.5), or as much as they like (none)."""
    limit = parsed(amount)
    for one in choose(socket_place.find(), process):
        ask(one, limit)
    if as_json:
        click.echo(msgspec.json.encode({"share": limit.share, "n_bytes": limit.n_bytes}))
        return
    click.echo(f"psi-kv limit: {process} holds at most {amount} under pressure", err=True)


def parsed(amount: str) -> Limit:
    """A limit as it was typed. Raises BadInputError."""
    text = amount.strip().lower()
    if text == "none":
        return Limit()
    if match := _SIZE.fullmatch(text):
        return Limit(n_bytes=int(float(match[1]) * _UNITS[match[2]]))
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0.0 <= share <= 1.0:
        raise BadInputError(f"a limit of {amount} is not usable: give 2GiB, a share from 0 to 1, or none")
    return Limit(share=share)
