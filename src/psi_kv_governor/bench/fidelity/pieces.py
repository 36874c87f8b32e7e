"""What is finished is kept piece by piece, so that a run that was cut short goes on where it stopped."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np

from psi_kv_governor.bench.fidelity.likelihood import Tick
from psi_kv_governor.bench.fidelity.subject import Subject
from psi_kv_governor.errors import PsiKvError

T = TypeVar("T")

FOLDER = "unfinished"
"""Beside the report, until it is whole."""


@dataclass(frozen=True)
class Piece(Generic[T]):
    """A part of the benchmark that is measured in one go, in a minute or so on one core."""

    part: str
    name: str
    """Unlike all others of the part."""
    steps: int
    """How often `measure` ticks at most."""
    kind: Any
    """Type of the result: what MessagePack can hold, and arrays of float64."""
    measure: Callable[[Subject, Tick], T]
    take: Callable[[T], None]
    """Where the result goes."""


class Kept:
    """Results of pieces in a folder, or nowhere. Those of another run's setting count as not there."""

    def __init__(self, folder: Path | None, setting: object) -> None:
        """`setting` is all that the results depend on."""
        self._folder = folder / FOLDER if folder is not None else None
        self._tag = hashlib.sha256(repr(setting).encode()).hexdigest()[:16]

    def get(self, piece: Piece[T]) -> tuple[float, T] | None:
        """Seconds that `piece` took, and its result; None where there is none, or it can't be read."""
        if self._folder is None:
            return None
        try:
            found = self._path(self._folder, piece).read_bytes()
            seconds, rest = msgspec.msgpack.decode(found, type=tuple[float, msgspec.Raw])
            result: T = msgspec.msgpack.decode(rest, type=piece.kind, dec_hook=_decode)
        except (OSError, msgspec.DecodeError):
            return None
        return seconds, result

    def put(self, piece: Piece[T], seconds: float, result: T) -> None:
        """Keep it. Raises PsiKvError where it can't be written."""
        if self._folder is None:
            return
        path = self._path(self._folder, piece)
        try:
            self._folder.mkdir(exist_ok=True)
            new = path.with_suffix(".new")
            new.write_bytes(msgspec.msgpack.encode((seconds, result), enc_hook=_encode))
            new.replace(path)
        except OSError as error:
            raise PsiKvError(f"cannot write {path}: {error.strerror}") from error

    def clear(self) -> None:
        """The report is whole: nothing is left to go on with."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, folder: Path, piece: Piece[Any]) -> Path:
        return folder / f"{piece.part}-{piece.name}-{self._tag}.msgpack"


def _encode(value: object) -> object:
    if isinstance(value, np.ndarray):
        return value.astype(np.float64).tobytes()
    if isinstance(value, np.generic):
        return value.item()
    raise NotImplementedError(f"{type(value)} can't be kept")


def _decode(kind: type, value: object) -> object:
    if getattr(kind, "__origin__", kind) is np.ndarray and isinstance(value, bytes):
        return np.frombuffer(value, dtype=np.float64)
    raise NotImplementedError(f"{kind} can't be read back")
