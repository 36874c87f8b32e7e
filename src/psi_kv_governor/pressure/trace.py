"""Recorded pressure: the format of a trace, its readings, and a source that replays them.

A trace is a JSON Lines file, plain or gzip. Its first line is the header, `{"psi_kv_trace": 3}` at the
least; each line after it is an object whose `reading` is a Reading. What else such a line holds (a governor's
recording has the cache and the decision: `psi_kv_governor.recording`) is no matter of this room.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from psi_kv_governor.errors import BadInputError, SourceLostError
from psi_kv_governor.pressure.reading import MACHINE, Reading
from psi_kv_governor.whole_file import whole_file

VERSION = 3

_ONE_LEVEL = 2
"""The version of the first edition, whose readings had one stall and one headroom: still read."""

MOST_BYTES = 1 << 30
"""Largest trace that is read, unpacked: a week at ten readings a second. A gzip file can claim any size."""

_GZIP = b"\x1f\x8b"
_L = TypeVar("_L", bound=msgspec.Struct)


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The first line of a trace: what the lines after it were taken with."""

    psi_kv_trace: int
    """Version of the format."""
    package: str = ""
    """Version of the package that wrote it."""
    machine: dict[str, str | int] = {}
    """What sort of machine it was; nothing that says whose."""
    config: dict[str, Any] = {}
    """The governor's settings."""


class Lines(NamedTuple):
    """A trace file, taken apart."""

    header: Header
    lines: list[tuple[int, bytes]]
    """Number in the file and text of each line after the header."""
    note: str
    """What is missing at the end, in a clause; empty for a whole file."""


class _Line(msgspec.Struct, frozen=True):
    reading: Reading


def write_trace(path: Path, readings: Iterable[Reading]) -> None:
    """Write `readings` to `path`, whole or not at all. Raises BadInputError where it cannot be written."""
    encoder = msgspec.json.Encoder()
    try:
        with whole_file(path) as file:
            file.write(encoder.encode(Header(psi_kv_trace=VERSION)) + b"\n")
            for reading in readings:
                file.write(encoder.encode(_Line(reading)) + b"\n")
    except OSError as error:
        raise BadInputError(f"cannot write the trace {path}: {error.strerror}") from error


def read_trace(path: Path) -> list[Reading]:
    """The readings of a trace file. Raises BadInputError, with the number of the line, on a broken one."""
    return [line.reading for line in decode_lines(path, read_lines(path), _Line)]


def read_lines(path: Path) -> Lines:
    """Header and lines of a trace. Raises BadInputError where there is none, or one of another version.

    A last line without its end was cut off when the writer was killed: it is left out, and noted.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInputError(f"cannot read the trace {path}: {error.strerror}") from error
    note = ""
    if data.startswith(_GZIP):
        data, note = _unpacked(path, data)
    *whole, rest = data.split(b"\n")
    header = _header(path, whole[0] if whole else rest)
    if rest and whole:
        note = f"its last line ({len(rest)} bytes) was cut off and is left out"
    return Lines(header, list(enumerate(whole[1:], start=2)), note)


def decode_lines(path: Path, trace: Lines, kind: type[_L]) -> Iterator[_L]:
    """Each line as a `kind` with a `reading`. Raises BadInputError, with its number, on a bad one."""
    decoder = msgspec.json.Decoder(kind)
    before: Reading | None = None
    for number, line in trace.lines:
        try:
            if trace.header.psi_kv_trace == _ONE_LEVEL:
                entry = msgspec.convert(_with_levels(msgspec.json.decode(line)), kind)
            else:
                entry = decoder.decode(line)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise BadInputError(f"line {number} of the trace {path} is broken: {error}") from error
        reading: Reading = entry.reading  # type: ignore[attr-defined]  # every kind of line has one
        problem = _problem(reading, before)
        if problem:
            raise BadInputError(f"line {number} of the trace {path} makes no sense: {problem}")
        before = reading
        yield entry


def _with_levels(entry: Any) -> Any:
    """A line of the first edition with its one stall and one headroom as the only level."""
    reading = entry.get("reading") if isinstance(entry, dict) else None
    if not isinstance(reading, dict):
        return entry
    kept = {"time_s", "interval_s", "own_resident_bytes", "own", "source"}
    level = {name: value for name, value in reading.items() if name not in kept}
    rest = {name: value for name, value in reading.items() if name in kept}
    return {**entry, "reading": {**rest, "levels": [{"name": MACHINE, **level}]}}


def _unpacked(path: Path, data: bytes) -> tuple[bytes, str]:
    """The content of a gzip file, as far as it goes, and a note where that is not all."""
    unpacker = zlib.decompressobj(wbits=31)  # 16 for gzip, 15 for its largest window
    try:
        content = unpacker.decompress(data, MOST_BYTES)
    except zlib.error as error:
        raise BadInputError(f"cannot unpack the trace {path}: {error}") from error
    if unpacker.unconsumed_tail:
        raise BadInputError(f"the trace {path} holds more than {MOST_BYTES >> 20} MiB: give a shorter one")
    return content, "" if unpacker.eof else "its end is missing"


def _header(path: Path, line: bytes) -> Header:
    try:
        version = msgspec.json.decode(line, type=_Version).psi_kv_trace
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise BadInputError(
            f'line 1 of {path} is not the header of a trace: give {{"psi_kv_trace": {VERSION}}}'
        ) from error
    if version not in {VERSION, _ONE_LEVEL}:
        raise BadInputError(
            f"line 1 of {path}: version {version} of the trace is not known; "
            "record it again with this package"
        )
    try:
        return msgspec.json.decode(line, type=Header)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise BadInputError(f"line 1 of {path} is not usable: {error}") from error


class _Version(msgspec.Struct, frozen=True):
    """What every version of the header has."""

    psi_kv_trace: int


def _problem(reading: Reading, before: Reading | None) -> str:
    """What is wrong with a reading that decoded; empty when nothing is."""
    if not math.isfinite(reading.time_s):
        return "time_s is not a finite number"
    if before is not None and reading.time_s < before.time_s:
        return f"time_s goes back from {before.time_s} to {reading.time_s}"
    if not 0.0 <= reading.interval_s < math.inf:
        return f"interval_s = {reading.interval_s} is not a length of time"
    for level in reading.levels:
        for name in ("some", "full"):
            share = getattr(level, name)
            if share is not None and not 0.0 <= share <= 1.0:
                return f"{name} = {share} is not a share from 0 to 1"
        for name in ("headroom_bytes", "limit_bytes"):
            n_bytes = getattr(level, name)
            if n_bytes is not None and n_bytes < 0:
                return f"{name} = {n_bytes} is below 0"
    return ""


class TraceSource:
    """Replays readings one at a time, as they are. After the last one it is lost, as a file that is gone."""

    def __init__(self, readings: Path | Sequence[Reading]) -> None:
        if isinstance(readings, Path):
            self._name = f"trace {readings}"
            self._readings: Sequence[Reading] = read_trace(readings)
        else:
            self._name = f"trace of {len(readings)} readings"
            self._readings = readings
        self._next = 0

    @property
    def name(self) -> str:
        """What is read, in words a user can follow up."""
        return self._name

    def read(self) -> Reading:
        """The next reading. Raises SourceLostError after the last one."""
        if self._next >= len(self._readings):
            raise SourceLostError(f"the {self._name} is over")
        reading = self._readings[self._next]
        self._next += 1
        return reading

    def close(self) -> None:
        """Nothing to give back. Safe to call twice."""
