"""`psi-kv dashboard`: a governed process as a page in a browser, through its status socket."""

from __future__ import annotations

from contextlib import closing, suppress
from functools import partial

import click
import msgspec

from psi_kv_governor import socket_place
from psi_kv_governor.cli._governed import choose
from psi_kv_governor.cli._group import example
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.service.address import address
from psi_kv_governor.status_client import ask, connect, messages


@click.command(
    "dashboard",
    short_help="See a governed process as a page in a browser.",
    epilog=example("psi-kv dashboard", "psi-kv dashboard 4711 --at 8123"),
)
@click.argument("process", metavar="[PID|NAME]", required=False)
@click.option(
    "--at",
    "where",
    default="0",
    metavar="[HOST:]PORT",
    help="Where to serve it [a free port, this machine alone].",
)
@click.option("--json", "as_json", is_flag=True, help="Print the address as JSON.")
def command(process: str | None, where: str, as_json: bool) -> None:
    """Serve a page that shows stall, headroom, the cache as blocks, and events of a governed process, with
    buttons to park, unpark and limit.

    Without PID or name, the one that there is. The address it prints has a token in it: who has that may look
    and act.
    """
    from psi_kv_governor.service.dashboard import DashboardServer, Watched

    at = address(where, "--at")
    found = choose(socket_place.find(), process)
    if process is None and len(found) > 1:
        pids = ", ".join(str(one.pid) for one in found)
        raise PsiKvError(f"more than one governed process ({pids}): say which, as `psi-kv dashboard PID`")
    with closing(connect(found[0])) as connection:
        try:
            server = DashboardServer(Watched(messages(connection), partial(ask, found[0])), at)
        except OSError as error:
            raise PsiKvError(f"no dashboard at {at}: {error.strerror or error}") from error
        if as_json:
            click.echo(msgspec.json.encode({"url": server.url}))
        else:
            click.echo(f"dashboard at {server.url} (Ctrl-C ends it; the process does not notice)")
        with closing(server), suppress(KeyboardInterrupt):
            server.wait()
