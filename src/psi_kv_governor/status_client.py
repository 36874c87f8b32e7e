"""Talking to a governed process through its status socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import msgspec

from psi_kv_governor import socket_place
from psi_kv_governor.commands import Answer, Command
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.socket_place import Found
from psi_kv_governor.status_messages import VERSION, Hello, Update

_SILENCE_S = 10.0
"""A process that is stopped, or waits for all of its pages, says nothing for a while."""
_READ_BYTES = 1 << 16
_MOST_LINE_BYTES = 1 << 22


def connect(found: Found) -> socket.socket:
    """A connection to its governor. Raises PsiKvError."""
    try:
        return socket_place.connect(found.path, _SILENCE_S)
    except OSError as error:
        raise PsiKvError(f"cannot reach process {found.pid}: {error.strerror or error}") from error


def messages(connection: socket.socket) -> Iterator[Hello | Update | Answer]:
    """A Hello, then Updates, and Answers to what was sent, until the process ends. Raises PsiKvError where it
    speaks otherwise, or not."""
    lines = _lines(connection)
    hello = _decoded(next(lines, b""), Hello)
    if hello.psi_kv_status != VERSION:
        raise PsiKvError(f"process {hello.pid} runs another version of this package: use that one's psi-kv")
    yield hello
    for line in lines:
        yield _decoded(line, Update | Answer)


def ask(found: Found, command: Command) -> Answer:
    """Have a command carried out. Raises PsiKvError where it was not, with the reason."""
    with closing(connect(found)) as connection:
        lines = messages(connection)
        next(lines)
        try:
            connection.sendall(msgspec.json.encode(command) + b"\n")
        except OSError as error:
            raise PsiKvError(f"process {found.pid} has ended: {error.strerror or error}") from error
        for line in lines:
            if isinstance(line, Answer):
                if line.error:
                    raise PsiKvError(f"process {found.pid}: {line.error}")
                return line
    raise PsiKvError(f"process {found.pid} ended before it answered")


def told(found: Found) -> Update:
    """How it stands now. Raises PsiKvError."""
    with closing(connect(found)) as connection:
        for line in messages(connection):
            if isinstance(line, Update):
                return line
    raise PsiKvError(f"process {found.pid} ended before it said how it stands")


def _decoded(line: bytes, kind: Any) -> Any:
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
