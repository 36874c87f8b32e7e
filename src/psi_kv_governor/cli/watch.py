"""`psi-kv watch`: a live view of a governed process, through its status socket."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.live import Live

from psi_kv_governor import socket_place
from psi_kv_governor.cli._group import example
from psi_kv_governor.cli._watch_view import WatchView, event_line, plain_line
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.socket_place import Found
from psi_kv_governor.status_socket import VERSION, Hello, Update

_PLAIN_S = 2.0
"""Where the output is no terminal: a line so often, and whenever something happened."""
_SILENCE_S = 10.0
"""A process that is stopped, or waits for all of its pages, says nothing for a while."""
_READ_BYTES = 1 << 16
_MOST_LINE_BYTES = 1 << 22


@click.command(
    "watch",
    short_help="See a governed process live.",
    epilog=example("psi-kv watch", "psi-kv watch 4711 --once", "psi-kv watch --json > evening.jsonl"),
)
@click.argument("pid", type=click.IntRange(min=1), required=False)
@click.option("--once", is_flag=True, help="Show how it stands now, and end.")
@click.option("--json", "as_json", is_flag=True, help="Its updates as JSON, a line each.")
@click.pass_context
def command(ctx: click.Context, pid: int | None, once: bool, as_json: bool) -> None:
    """Show stall, headroom, cells and events of a governed process of this user as they are.

    Without PID, the one that there is. Ctrl-C ends it; the process does not notice.
    """
    found = choose(socket_place.find(), pid)
    if len(found) > 1:
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
            _as_text(f"{_program(hello.pid)} ({hello.pid})", hello, updates, once=once)
        if not once:
            click.echo(f"psi-kv watch: process {hello.pid} has ended, or closed its model", err=True)


def choose(found: list[Found], pid: int | None) -> list[Found]:
    """The socket of `pid`, or one of every process: where it has several models, that of the first.

    Raises PsiKvError, saying what to do, where there is none.
    """
    if pid is None:
        if not found:
            raise PsiKvError(
                "no governed process of this user was found: start one (`psi-kv chat`, or GovernedLlama in a "
                "program), with status_socket on"
            )
        return list({one.pid: one for one in reversed(found)}.values())[::-1]
    chosen = [one for one in found if one.pid == pid]
    if not chosen:
        known = ", ".join(dict.fromkeys(str(one.pid) for one in found)) or "none"
        raise PsiKvError(f"process {pid} is not a governed one of this user: there are {known}")
    return chosen[:1]


def connect(found: Found) -> socket.socket:
    try:
        return socket_place.connect(found.path, _SILENCE_S)
    except OSError as error:
        raise PsiKvError(f"cannot watch process {found.pid}: {error.strerror or error}") from error


def messages(connection: socket.socket) -> Iterator[Hello | Update]:
    """A Hello, then Updates until the process ends. Raises PsiKvError where it speaks otherwise, or not."""
    lines = _lines(connection)
    hello = _decoded(next(lines, b""), Hello)
    if hello.psi_kv_status != VERSION:
        raise PsiKvError(f"process {hello.pid} runs another version of this package: watch it with that one")
    yield hello
    for line in lines:
        yield _decoded(line, Update)


def _decoded(line: bytes, kind: type[msgspec.Struct]) -> Any:
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.DecodeError, ValueError) as error:
        raise PsiKvError(f"the process says what is not understood here ({error}): same version?") from error


def _lines(connection: socket.socket) -> Iterator[bytes]:
    rest = b""
    while True:
        try:
            data = connection.recv(_READ_BYTES)
        except TimeoutError:
            raise PsiKvError(f"the process said nothing for {_SILENCE_S:.0f} s: is it stopped?") from None
        except ConnectionError:
            return
        if not data:
            return
        *whole, rest = (rest + data).split(b"\n")
        yield from whole
        if len(rest) > _MOST_LINE_BYTES:
            raise PsiKvError("the process sends a line without an end: not a governed one")


# -- what it prints ----------------------------------------------------------------------------------------


def _list(found: list[Found], as_json: bool) -> None:
    for pid in dict.fromkeys(one.pid for one in found):
        if as_json:
            click.echo(msgspec.json.encode({"pid": pid, "program": _program(pid)}))
        else:
            click.echo(f"{pid:>8}  {_program(pid)}")


def _program(pid: int, root: Path = Path("/")) -> str:
    """Name of the program, where the kernel tells it."""
    try:
        return (root / "proc" / str(pid) / "comm").read_text(errors="replace").strip()
    except OSError:
        return "process"


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
