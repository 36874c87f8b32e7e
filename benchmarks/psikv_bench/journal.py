"""What is finished, a JSON line each, so that an interrupted benchmark can go on where it stopped."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np

from psi_kv_governor.errors import BadInputError, PsiKvError

_T = TypeVar("_T")
_W = TypeVar("_W")


class Journal(Generic[_T]):
    """The finished parts of one benchmark, in memory, and in a file where there is a `path`, a line each.

    The file's first line is the `head`: parts of another plan are not mixed with these. Raises BadInputError
    when there is a file and `go_on` is not set, or when its head is another; PsiKvError when it can't be
    written.
    """

    def __init__(self, path: Path | None, head: bytes, kind: Any, *, go_on: bool) -> None:
        self.parts: list[_T] = []
        self.interrupted = False
        self._path = path
        if path is None:
            return
        if not path.exists():
            self._append(head)
        elif go_on:
            self.parts = list(_read(path, head, kind))
        else:
            raise BadInputError(
                f"{path.parent} holds a run: go on with it with --resume, or give another --out-dir"
            )

    def play(self, ahead: Iterable[_W], one: Callable[[_W], _T]) -> None:
        """Do each thing that is `ahead`, and keep what comes of it. Ctrl-C ends it early.

        Raises PsiKvError where nothing is finished by then.
        """
        try:
            for what in ahead:
                self.add(one(what))
        except KeyboardInterrupt:
            self.interrupted = True
            if not self.parts:
                raise PsiKvError(
                    "interrupted before the first run was finished: there is nothing to report"
                ) from None

    def add(self, part: _T) -> None:
        """Keep a finished part: on disk when this returns."""
        self.parts.append(part)
        if self._path is not None:
            self._append(encoded(part))

    def _append(self, line: bytes) -> None:
        assert self._path is not None, "nothing is written without a file"
        try:
            with self._path.open("ab") as file:
                file.write(line + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise PsiKvError(f"cannot write {self._path}: {error.strerror}") from error


def remaining(schedule: Iterable[_W], done: Iterable[_W]) -> list[_W]:
    """What of the schedule is not among those `done`, in its order."""
    counts, ahead = Counter(done), []
    for what in schedule:
        if counts[what]:
            counts[what] -= 1
        else:
            ahead.append(what)
    return ahead


def _read(path: Path, head: bytes, kind: Any) -> Iterator[Any]:
    data = path.read_bytes()
    whole, _, cut = data.rpartition(b"\n")
    if cut:  # a line that was being written when the machine went down
        path.write_bytes(whole + b"\n")
    first, *rest = whole.splitlines() or [b""]
    if first != head:
        raise BadInputError(f"{path} was begun with other options: give the same ones, or another --out-dir")
    for number, line in enumerate(rest, 2):
        try:
            yield decoded(line, kind)
        except msgspec.DecodeError as error:
            raise BadInputError(f"line {number} of {path} is damaged: {error}") from error


def encoded(value: Any) -> bytes:
    """As JSON, arrays as lists."""
    return msgspec.json.encode(value, enc_hook=_listed)


def decoded(data: bytes | msgspec.Raw, kind: Any) -> Any:
    """Back from JSON. Raises msgspec.DecodeError."""
    return msgspec.json.decode(data, type=kind, dec_hook=_array)


def _listed(value: object) -> object:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise NotImplementedError(f"{type(value)} can't be kept")


def _array(kind: type, value: object) -> object:
    if getattr(kind, "__origin__", kind) is np.ndarray and isinstance(value, list):
        return np.asarray(value, dtype=np.float64)
    raise NotImplementedError(f"{kind} can't be read back")
