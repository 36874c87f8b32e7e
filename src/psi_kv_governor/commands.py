"""What can be asked of a governed process through its status socket, and the answers: a JSON line each."""

from __future__ import annotations

from typing import Protocol

import msgspec

from psi_kv_governor.cache import Result
from psi_kv_governor.errors import PsiKvError

VERSION = 1
"""Of the commands; it stands in each as `psi_kv_command`."""


class _Command(msgspec.Struct, frozen=True, kw_only=True, tag_field="do", forbid_unknown_fields=True):
    psi_kv_command: int = VERSION


class Trim(_Command, frozen=True, kw_only=True, tag="trim"):
    """Give up a share (0 to 1) of what may go."""

    fraction: float = 0.5


class Restore(_Command, frozen=True, kw_only=True, tag="restore"):
    """Bring back what is masked, up to so many bytes."""

    max_bytes: int | None = None


class Park(_Command, frozen=True, kw_only=True, tag="park"):
    """Park a sequence; without one all that are not being decoded, and the saved states."""

    sequence: int | None = None


class Unpark(_Command, frozen=True, kw_only=True, tag="unpark"):
    """Read a sequence back; without one all."""

    sequence: int | None = None


class Limit(_Command, frozen=True, kw_only=True, tag="limit"):
    """Hold at most this share (0 to 1), or so many bytes, under pressure; neither lifts the limit."""

    share: float | None = None
    n_bytes: int | None = None


Command = Trim | Restore | Park | Unpark | Limit


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag_field="says", tag="answer"):
    """What came of a command. The answers of a connection come in the order of its commands."""

    error: str = ""
    """Why it was not carried out, in one line; empty when it was."""
    result: Result | None = None
    """What was really done; None for a limit, and with an error."""


class _Version(msgspec.Struct, frozen=True):
    psi_kv_command: int


class Led(Protocol):
    """What a command asks of a governor."""

    def trim(self, fraction: float = ...) -> Result: ...

    def restore(self, max_bytes: int | None = ...) -> Result: ...

    def park(self, sequence: int | None = ...) -> Result: ...

    def unpark(self, sequence: int | None = ...) -> Result: ...

    def limit(self, share: float | None = ..., *, n_bytes: int | None = ...) -> None: ...


_commands = msgspec.json.Decoder(Command)
_version = msgspec.json.Decoder(_Version)


def answered(governor: Led, line: bytes) -> Answer:
    """Carry out the command in `line`. Raises nothing: what is wrong stands in the answer."""
    try:
        version = _version.decode(line).psi_kv_command
        if version != VERSION:
            return Answer(error=f"version {version} of the commands is not known here, but {VERSION}")
        return Answer(result=_done(governor, _commands.decode(line)))
    except (msgspec.DecodeError, ValueError, RecursionError, PsiKvError) as error:
        wrong = not isinstance(error, PsiKvError)
        return Answer(error=f"no command: {error}" if wrong else str(error))
    except Exception as error:  # an engine's own failure: whoever asks is told, and the socket lives on
        return Answer(error=f"it failed ({type(error).__name__}: {error})")


def _done(governor: Led, command: Command) -> Result | None:
    match command:
        case Trim():
            return governor.trim(command.fraction)
        case Restore():
            return governor.restore(command.max_bytes)
        case Park():
            return governor.park(command.sequence)
        case Unpark():
            return governor.unpark(command.sequence)
        case Limit():
            governor.limit(command.share, n_bytes=command.n_bytes)
    return None
