"""Finding a governed process of this user by its number or name."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.socket_place import Found
from psi_kv_governor.status_client import connect, messages
from psi_kv_governor.status_messages import Hello


def choose(found: list[Found], process: str | None) -> list[Found]:
    """The sockets of a process, by its number or its name: of a program that has several models, all.

    Without `process`, one socket of every process. Raises PsiKvError, saying what to do, where there is none.
    """
    if not found:
        raise PsiKvError(
            "no governed process of this user was found: start one (`psi-kv chat`, or GovernedLlama in a "
            "program), with status_socket on"
        )
    if process is None:
        return list({one.pid: one for one in reversed(found)}.values())[::-1]
    chosen = [one for one in found if process == str(one.pid)]
    chosen = chosen or [one for one in found if process in {program(one.pid), _name(one)}]
    if not chosen:
        known = ", ".join(dict.fromkeys(f"{one.pid} ({program(one.pid)})" for one in found))
        raise PsiKvError(f"{process} is not a governed process of this user: there are {known}")
    if len({one.pid for one in chosen}) > 1:
        numbers = ", ".join(dict.fromkeys(str(one.pid) for one in chosen))
        raise PsiKvError(f"{process} is the name of several processes: say which of {numbers}")
    return chosen


def _name(found: Found) -> str:
    """What its governor is called; '' where it does not answer."""
    try:
        with closing(connect(found)) as connection:
            hello = next(messages(connection))
    except (PsiKvError, OSError):
        return ""
    return hello.name if isinstance(hello, Hello) else ""


def program(pid: int, root: Path = Path("/")) -> str:
    """Name of the program, where the kernel tells it."""
    try:
        return (root / "proc" / str(pid) / "comm").read_text(errors="replace").strip()
    except OSError:
        return "process"
