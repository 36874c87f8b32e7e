"""Recorded pressure: a JSON Lines file of Readings, written, read, and replayed as a source.

The first line is the header `{"psi_kv_trace": 1}`; each line after it is one Reading.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from psi_kv_governor.errors import BadInputError, SourceLostError
from psi_kv_governor.pressure.reading import Reading

VERSION = 1


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    psi_kv_trace: int


def write_trace(path: Path, readings: Iterable[Reading]) -> None:
    """Write `readings` to `path`, whole or not at all. Raises BadInputError where it cannot be written."""
    encoder = msgspec.json.Encoder()
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            file.write(encoder.encode(_Header(VERSION)) + b"\n")
            for reading in readings:
                file.write(encoder.encode(reading) + b"\n")
        partial.replace(path)
    except OSError as error:
        raise BadInputError(f"cannot write the trace {path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def read_trace(path: Path) -> list[Reading]:
    """The readings of a trace file. Raises BadInputError, with the number of the line, on a broken one."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise BadInputError(f"cannot read the trace {path}: {error.strerror}") from error
    _check_header(path, lines[0] if lines else b"")
    decoder = msgspec.json.Decoder(Reading)
    readings: list[Reading] = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            reading = decoder.decode(line)
        except (msgspec.DecodeError, ValueError) as error:
            raise BadInputError(f"line {number} of the trace {path} is broken: {error}") from error
        problem = _problem(reading, readings[-1] if readings else None)
        if problem:
            raise BadInputError(f"line {number} of the trace {path} makes no sense: {problem}")
        readings.append(reading)
    return readings


def _check_header(path: Path, line: bytes) -> None:
    try:
        header = msgspec.json.decode(line, type=_Header)
    except (msgspec.DecodeError, ValueError) as error:
        raise BadInputError(
            f'line 1 of {path} is not the header of a trace: give {{"psi_kv_trace": 1}}'
        ) from error
    if header.psi_kv_trace != VERSION:
        raise BadInputError(
            f"line 1 of {path}: version {header.psi_kv_trace} of the trace is not known, only {VERSION} is"
        )


def _problem(reading: Reading, before: Reading | None) -> str:
    """What is wrong with a reading that decoded; empty when nothing is."""
    if not math.isfinite(reading.time_s):
        return "time_s is not a finite number"
    if before is not None and reading.time_s < before.time_s:
        return f"time_s goes back from {before.time_s} to {reading.time_s}"
    if not 0.0 <= reading.interval_s < math.inf:
        return f"interval_s = {reading.interval_s} is not a length of time"
    for name in ("some", "full"):
        if not 0.0 <= getattr(reading, name) <= 1.0:
            return f"{name} = {getattr(reading, name)} is not a share from 0 to 1"
    for name in ("headroom_bytes", "limit_bytes"):
        value = getattr(reading, name)
        if value is not None and value < 0:
            return f"{name} = {value} is below 0"
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
