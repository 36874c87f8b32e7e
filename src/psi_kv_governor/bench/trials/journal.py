"""What is finished, a JSON line each, so that an interrupted benchmark can go on where it stopped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from psi_kv_governor.errors import BadInputError, PsiKvError

_T = TypeVar("_T")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a run goes on with: other options or another model would be another experiment."""

    bench: str
    model: str
    model_bytes: int
    options: Any
    """Without what may grow from one time to the next, such as the number of runs."""

    @classmethod
    def of(cls, bench: str, model: Path, options: msgspec.Struct) -> Plan:
        """The plan for a model's file."""
        return cls(bench=bench, model=model.name, model_bytes=model.stat().st_size, options=options)


class Journal(Generic[_T]):
    """The finished parts of one benchmark, in memory, and in a file where there is a `path`.

    The file's first line is the plan: parts of another plan are not mixed with these. Raises BadInputError
    when there is a file and `go_on` is not set, or when its plan is another; PsiKvError when it can't be
    written.
    """

    def __init__(self, path: Path | None, plan: Plan, kind: type[_T], *, go_on: bool) -> None:
        self.parts: list[_T] = []
        self._path = path
        if path is None:
            if go_on:
                raise BadInputError("there is nothing to go on with: --resume needs the --out-dir of the run")
            return
        if path.exists():
            if not go_on:
                raise BadInputError(
                    f"{path.parent} holds a run: go on with it with --resume, or give another --out-dir"
                )
            self.parts = list(_read(path, plan, kind))
        else:
            self._append(msgspec.json.encode(plan))

    def add(self, part: _T) -> None:
        """Keep a finished part: on disk when this returns."""
        self.parts.append(part)
        if self._path is not None:
            self._append(msgspec.json.encode(part))

    def _append(self, line: bytes) -> None:
        assert self._path is not None, "nothing is written without a file"
        try:
            with self._path.open("ab") as file:
                file.write(line + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise PsiKvError(f"cannot write {self._path}: {error.strerror}") from error


def _read(path: Path, plan: Plan, kind: type[_T]) -> Iterator[_T]:
    data = path.read_bytes()
    whole, _, cut = data.rpartition(b"\n")
    if cut:  # a line that was being written when the machine went down
        path.write_bytes(whole + b"\n")
    first, *rest = whole.splitlines() or [b""]
    if first != msgspec.json.encode(plan):
        raise BadInputError(f"{path} was begun with other options: give the same ones, or another --out-dir")
    for number, line in enumerate(rest, 2):
        try:
            yield msgspec.json.decode(line, type=kind)
        except msgspec.DecodeError as error:
            raise BadInputError(f"line {number} of {path} is damaged: {error}") from error
