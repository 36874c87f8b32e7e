"""`psi-kv watch`: a live view of a governed process, through its status socket."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress

import click
import msgspec
from rich.console import Console
from rich.live import Live

from psi_kv_governor import socket_place
from psi_kv_governor.cli._governed import choose, program
from psi_kv_governor.cli._group import example
from psi_kv_governor.cli._watch_view import WatchView, event_line, plain_line
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.socket_place import Found
from psi_kv_governor.status_client import connect, messages
from psi_kv_governor.status_messages import Hello, Update

_PLAIN_S = 2.0
"""Where the output is no terminal: a line so often, and whenever something happened."""


@click.command(
    "watch",
    short_help="See a governed process live.",
    epilog=example("psi-kv watch", "psi-kv watch 4711 --once", "psi-kv watch --json > evening.jsonl"),
)
@click.argument("process", metavar="[PID|NAME]", required=False)
@click.option("--once", is_flag=True, help="Show how it stands now, and end.")
@click.option("--json", "as_json", is_flag=True, help="Its updates as JSON, a line each.")
@click.pass_context
def command(ctx: click.Context, process: str | None, once: bool, as_json: bool) -> None:
    """Show a governed process of this user as it is: stall, headroom, its caches and sequences, and events.

    Without PID or name, the one that there is. Ctrl-C ends it; the process does not notice.
    """
    found = choose(socket_place.find(), process)
    if process is None and len(found) > 1:
        _list(found, as_json)
        click.echo("psi-kv watch: more than one governed process: say which, as `psi-kv watch PID`", err=True)
        ctx.exit(2)
    with suppress(KeyboardInterrupt), closing(connect(found[0])) as connection:
        lines = messages(connection)
        hello = next(lines)
        assert isinstance(hello, Hello)
        updates = (update for update in lines if isinstance(update, Update))
        if as_json:
            _as_json(updates, once=once)
        else:
            _as_text(f"{program(hello.pid)} ({hello.pid})", hello, updates, once=once)
        if not once:
            click.echo(f"psi-kv watch: process {hello.pid} has ended, or closed its model", err=True)


# -- what it prints ----------------------------------------------------------------------------------------


def _list(found: list[Found], as_json: bool) -> None:
    for pid in dict.fromkeys(one.pid for one in found):
        if as_json:
            click.echo(msgspec.json.encode({"pid": pid, "program": program(pid)}))
        else:
            click.echo(f"{pid:>8}  {program(pid)}")


def _as_json(updates: Iterator[Update], *, once: bool) -> None:
    for update in updates:
        click.echo(msgspec.json.encode(update))
        if once:
            return


def _as_text(name: str, hello: Hello, updates: Iterator[Update], *, once: bool) -> None:
    view = WatchView(name, hello.config)
    console = Console()
    if once:
        for update in updates:
            view.take(update)
            console.print(view)
            return
        raise PsiKvError(f"{name} ended before it said how it stands")
    if not console.is_terminal:
        _plain(updates)
        return
    with Live(view, console=console, auto_refresh=False) as live:
        for update in updates:
            view.take(update)
            live.refresh()


def _plain(updates: Iterator[Update]) -> None:
    due_s = 0.0
    for update in updates:
        for event in update.events:
            click.echo(event_line(event, update.time_s))
        if time.monotonic() >= due_s:
            due_s = time.monotonic() + _PLAIN_S
            click.echo(plain_line(update))
            sys.stdout.flush()
