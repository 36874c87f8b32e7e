"""What a benchmark measured: figures with their spread and what was asked of them, and of which machine."""

from __future__ import annotations

import contextlib
import datetime
import operator
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal

import msgspec

from psi_kv_governor.errors import BadInputError, PsiKvError

Say = Callable[[str], None]
"""Told in a few words what is being done now."""

Sign = Literal[">=", "<=", "<"]
Statistic = Literal["min", "median", "max"]

_HOLDS: dict[Sign, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "<": operator.lt,
}


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What every benchmark is told. None leaves a number to the benchmark."""

    model: Path
    quick: bool = False
    """The short form for CI, under three minutes on two cores; the full form is for the record."""
    threads: int | None = None
    repeats: int | None = None

    def __post_init__(self) -> None:
        for name in ("threads", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInputError(f"{name} = {value} is not usable: give 1 or more")


class Asked(msgspec.Struct, frozen=True):
    """A bound that one statistic of a figure has to keep."""

    sign: Sign
    bound: float
    statistic: Statistic = "median"
    """The median for timings, which a neighbour disturbs; the worst (min or max) for what has no noise."""


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One measured quantity, with every value that was taken. Made with `figure`."""

    name: str
    case: str
    """What it was measured on, where there are several cases."""
    unit: str
    min: float
    median: float
    max: float
    values: list[float]
    """In the order in which they were taken."""
    asked: Asked | None
    """None: for information."""
    passed: bool | None


def figure(
    name: str, unit: str, values: Sequence[float], asked: Asked | None = None, case: str = ""
) -> Figure:
    """Sum `values` up and hold them against what was asked. Raises ValueError without values."""
    if not values:
        raise ValueError(f"no values of {name}")
    spread = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    passed = None if asked is None else _HOLDS[asked.sign](spread[asked.statistic], asked.bound)
    return Figure(name=name, case=case, unit=unit, **spread, values=list(values), asked=asked, passed=passed)


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where it was measured. Holds no name of a person, a host or a folder."""

    architecture: str
    processor: str
    cores: int
    """Cores that this process may run on."""
    memory_bytes: int
    page_bytes: int
    kernel: str


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """All that somebody needs to measure it again, and to judge how quiet the machine was."""

    bench: str
    command: str
    quick: bool
    started_utc: str
    seconds: float
    machine: Machine
    versions: dict[str, str]
    model: str
    model_bytes: int
    threads: list[int]
    """Threads that decoded, a number for each setting that was measured."""
    load_before: float
    """Load average of the minute before the start: above 0.5, others were using the machine."""
    load_after: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole of one benchmark, as it is kept in JSON."""

    header: Header
    passed: bool
    figures: list[Figure]

    def missed(self) -> list[Figure]:
        """The figures that miss what was asked."""
        return [found for found in self.figures if found.passed is False]

    def to_json(self) -> bytes:
        """Indented, for files that are read and compared."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"


class Recorder:
    """Notes the circumstances from when it is made until `report`."""

    def __init__(self, bench: str, options: Options, threads: Sequence[int]) -> None:
        self._bench, self._options, self._threads = bench, options, list(threads)
        self._load_before = os.getloadavg()[0]
        self._started_utc = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self._began_s = time.monotonic()

    def report(self, figures: Sequence[Figure]) -> Report:
        """The report on `figures`, which were measured since this was made."""
        header = Header(
            bench=self._bench,
            command=command_line(),
            quick=self._options.quick,
            started_utc=self._started_utc,
            seconds=time.monotonic() - self._began_s,
            machine=machine(),
            versions=versions(),
            model=self._options.model.name,
            model_bytes=self._options.model.stat().st_size,
            threads=self._threads,
            load_before=self._load_before,
            load_after=os.getloadavg()[0],
        )
        passed = not any(found.passed is False for found in figures)
        return Report(header=header, passed=passed, figures=list(figures))


def command_line(arguments: Sequence[str] | None = None) -> str:
    """The command as it can be typed again, without the folders that its files lie in."""
    program, *rest = sys.argv if arguments is None else arguments
    name = Path(program).name
    return " ".join(["psi-kv" if name == "__main__.py" else name, *map(_without_folder, rest)])


def _without_folder(word: str) -> str:
    option, equals, value = word.rpartition("=")
    return option + equals + (Path(value).name if os.sep in value else value)


def cores() -> int:
    """Cores that this process may run on: fewer than the machine's in a container or under taskset."""
    return len(os.sched_getaffinity(0))


def machine(root: Path = Path("/")) -> Machine:
    """This machine. `root` stands in for the folder that holds /proc."""
    return Machine(
        architecture=platform.machine(),
        processor=_processor(root),
        cores=cores(),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        page_bytes=os.sysconf("SC_PAGE_SIZE"),
        kernel=f"{platform.system()} {_numbers(platform.release())}",
    )


def _numbers(release: str) -> str:
    """6.18.4-who-built-it -> 6.18.4"""
    found = re.match(r"\d+(\.\d+)*", release)
    return found[0] if found else release


def _processor(root: Path) -> str:
    """x86 has "model name" for each core; ARM boards have one "Model" at the end, or nothing."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in {"model name", "Model"} and value.strip():
                return value.strip()
    return platform.processor() or "unknown"


def versions() -> dict[str, str]:
    """Versions of what the figures depend on. A package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in ("psi-kv-governor", "llama-cpp-python", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def check_writable(path: Path) -> None:
    """Say before minutes are spent that the report could not be kept. Raises BadInputError."""
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise BadInputError(f"cannot write {path}: give a file in a folder that exists and is yours")


def check_folder(path: Path) -> None:
    """Make the folder, or say before minutes are spent that nothing can be kept. Raises BadInputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInputError(f"cannot make {path}: {error.strerror}; give another --out-dir") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise BadInputError(f"cannot write into {path}: give an --out-dir that is yours")


def save(report: Report, path: Path) -> None:
    """Write the report; an earlier one stays whole until the new one is. Raises PsiKvError."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".bench-") as folder:
            new = Path(folder) / path.name
            new.write_bytes(report.to_json())
            new.replace(path)
    except OSError as error:
        raise PsiKvError(f"cannot write {path}: {error.strerror}") from error
