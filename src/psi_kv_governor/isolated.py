"""Looking at something in a child process, so that whatever it meets there can't end the one who looks."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, cast

import msgspec

_T = TypeVar("_T")

LONGEST_S = 120.0
"""What takes longer stands still: a folder on a machine that is gone, a disk that answers no more."""
_PIECE_BYTES = 1 << 16


class EndedError(Exception):
    """The child did not end as it should: in words, why."""


def looked(look: Callable[[], _T], kind: Any, longest_s: float = LONGEST_S) -> _T:
    """What `look` gives, called in a forked child; `kind` is its type, which has to be plain data.

    Raises EndedError where the child was killed (by a seccomp filter, a broken library, the kernel), raised
    something or took longer; OSError where no child can be started.
    """
    reader, writer = os.pipe()
    try:
        child = os.fork()
    except OSError:
        os.close(reader)
        os.close(writer)
        raise
    if child == 0:
        _be_the_child(look, writer)
    os.close(writer)
    try:
        answer, late = _read(reader, longest_s)
    finally:
        os.close(reader)
        status = _end(child)
    if late:
        raise EndedError(f"it took longer than {longest_s:.0f} s")
    if os.WIFSIGNALED(status):
        raise EndedError(f"it was ended by {_name(os.WTERMSIG(status))}")
    try:
        decoded: Any = msgspec.json.decode(answer, type=tuple[kind | None, str])
    except msgspec.DecodeError:
        raise EndedError(f"it ended by itself, with status {os.waitstatus_to_exitcode(status)}") from None
    found, problem = decoded
    if problem:
        raise EndedError(problem)
    return cast("_T", found)


def _be_the_child(look: Callable[[], object], writer: int) -> NoReturn:
    """Nothing of the parent may be run to its end here: no handlers, no buffers flushed."""
    try:
        try:
            answer = msgspec.json.encode((look(), ""))
        except BaseException as error:
            answer = msgspec.json.encode((None, f"{type(error).__name__}: {' '.join(str(error).split())}"))
        while answer:
            answer = answer[os.write(writer, answer) :]
    finally:
        os._exit(0)


def _read(reader: int, longest_s: float) -> tuple[bytes, bool]:
    """All that is written until its end, and whether that did not come in time."""
    until_s = time.monotonic() + longest_s
    parts: list[bytes] = []
    while (left_s := until_s - time.monotonic()) > 0.0:
        if not select.select([reader], [], [], left_s)[0]:
            break
        part = os.read(reader, _PIECE_BYTES)
        if not part:
            return b"".join(parts), False
        parts.append(part)
    return b"", True


def _end(child: int) -> int:
    """The wait status of the child, which is killed where it has not ended by now."""
    with contextlib.suppress(OSError):
        for _ in range(50):  # what has closed its pipe is about to end
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return status
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1]
    return 0


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
