"""The record of a benchmark: where it was measured, what came of it, and how it is kept and gone on with."""

from __future__ import annotations

import csv
import datetime
import io
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.whole_file import whole_file
from psikv_bench.figures import Figure
from psikv_bench.journal import Journal, encoded
from psikv_bench.machine import Machine, command_line, machine, versions
from psikv_bench.options import Options

RESULT, SUMMARY, JOURNAL = "result.json", "summary.md", "journal.jsonl"

_S = TypeVar("_S", bound=Options)
_T = TypeVar("_T")


class Say(Protocol):
    """Hears in a few words what is being done now; `new` marks the beginning of something long."""

    def __call__(self, doing: str, *, new: bool = False) -> None: ...


def say_nothing(doing: str, *, new: bool = False) -> None:
    """For those who don't listen."""


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

    @property
    def words(self) -> str:
        """In a line."""
        machine = self.machine
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"`{self.command}`, {self.started_utc}, {self.seconds:.0f} s; {self.model}, "
            f"{' and '.join(map(str, self.threads))} of {machine.cores} cores, {machine.processor}, "
            f"{machine.memory_bytes >> 20} MiB, {machine.kernel}; {versions}; "
            f"load {self.load_before:.2f} before, {self.load_after:.2f} after"
        )


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of words, as they are printed and written. The first column is a name."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    @classmethod
    def of(cls, title: str, columns: Mapping[str, Callable[[_T], object]], items: Iterable[_T]) -> Table:
        """A row for each item: what each column says of it."""
        rows = [[str(say(item)) for say in columns.values()] for item in items]
        return cls(title=title, columns=list(columns), rows=rows)


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole of one benchmark, as it is kept in JSON."""

    header: Header
    options: Any
    """What was asked for, and what was worked out from what the model takes."""
    interrupted: bool
    passed: bool
    figures: list[Figure]
    """What is held against what was asked."""
    tables: list[Table]
    notes: list[str]
    """What has to be known to read the figures."""
    rows: Any
    """What the tables say, as numbers."""

    @property
    def missed(self) -> list[Figure]:
        """The figures that miss what was asked."""
        return [found for found in self.figures if found.passed is False]

    def to_json(self) -> bytes:
        """Indented, for files that are read and compared."""
        return msgspec.json.format(encoded(self), indent=2) + b"\n"


class Recorder(Generic[_S]):
    """One run of a benchmark: notes the circumstances from when it is made until `report`."""

    def __init__(
        self,
        bench: str,
        options: _S,
        *,
        quick: bool = False,
        folder: Path | None = None,
        resume: bool = False,
        say: Say = say_nothing,
    ) -> None:
        """The record is kept in `folder`. Raises BadInputError where it can't be."""
        self.bench, self.options, self.quick, self.folder, self.say = bench, options, quick, folder, say
        self._resume = resume
        self._load_before = os.getloadavg()[0]
        self._started_utc = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self._began_s = time.monotonic()
        if folder is not None:
            check_folder(folder)
        elif resume:
            raise BadInputError("there is nothing to go on with: --resume needs the --out-dir of the run")

    @property
    def model(self) -> Path:
        """The model's file."""
        return Path(self.options.model)

    def journal(self, kind: Any, plan: Any) -> Journal[Any]:
        """The finished parts of `kind`: those that the folder holds where it goes on with a run of `plan`.

        `plan` is without what may grow from one time to the next, such as the number of runs.
        """
        if self.folder is not None and (self.folder / RESULT).exists() and not self._resume:
            raise BadInputError(
                f"{self.folder} holds a report already: go on with --resume, or give another --out-dir"
            )
        size = self.model.stat().st_size
        head = encoded({"bench": self.bench, "model": self.model.name, "model_bytes": size, "options": plan})
        return Journal(self.folder and self.folder / JOURNAL, head, kind, go_on=self._resume)

    def report(
        self,
        figures: Sequence[Figure],
        threads: Sequence[int],
        *,
        options: Any = None,
        interrupted: bool = False,
        tables: Sequence[Table] = (),
        notes: Sequence[str] = (),
        rows: Any = None,
    ) -> Report:
        """The report on `figures`, which were measured since this was made."""
        header = Header(
            bench=self.bench,
            command=command_line(),
            quick=self.quick,
            started_utc=self._started_utc,
            seconds=time.monotonic() - self._began_s,
            machine=machine(),
            versions=versions(),
            model=self.model.name,
            model_bytes=self.model.stat().st_size,
            threads=list(threads),
            load_before=self._load_before,
            load_after=os.getloadavg()[0],
        )
        asked = msgspec.structs.replace(self.options, model=self.model.name)
        return Report(
            header=header,
            options={"asked": asked, **(options or {})},
            interrupted=interrupted,
            passed=not any(found.passed is False for found in figures),
            figures=list(figures),
            tables=list(tables),
            notes=list(notes),
            rows=rows,
        )

    def save(
        self, report: Report, records: Sequence[dict[str, Any]] = (), *draw: Callable[[Path], str]
    ) -> Report:
        """Write result.json and summary.md, `records` as a CSV file, and what each `draw` draws.

        `draw` gives the name of its plot, or raises ModuleNotFoundError where nothing can be drawn. Raises
        PsiKvError where something can't be written.
        """
        if self.folder is None:
            return report
        plots = []
        try:
            plots = [one(self.folder) for one in draw]
        except ModuleNotFoundError as error:
            report = msgspec.structs.replace(
                report, notes=[*report.notes, f"no plot: {error.name} is missing"]
            )
        except OSError as error:
            raise PsiKvError(f"cannot write the plot into {self.folder}: {error.strerror}") from error
        write(self.folder / RESULT, report.to_json())
        write(self.folder / SUMMARY, markdown(report, plots).encode())
        if records:
            write(self.folder / f"{self.bench}.csv", as_csv(records).encode())
        return report


# -- how it is written -------------------------------------------------------------------------------------


def markdown(report: Report, plots: Sequence[str] = ()) -> str:
    """The report as it is read. `plots` are names of files that lie beside it."""
    lines = [f"# psi-kv bench {report.header.bench}", ""]
    if report.interrupted:
        lines += ["Interrupted: what was finished until then.", ""]
    lines += [line for name in plots for line in (f"![{name}]({name})", "")]
    for table in report.tables:
        lines += [f"## {table.title}", "", *as_table(table), ""]
    lines += ["## Verdict", "", *(f"- {found.verdict}" for found in report.figures), ""]
    lines += [*(f"- {note}" for note in report.notes), "", report.header.words]
    return "\n".join(lines) + "\n"


def as_table(table: Table) -> list[str]:
    """The lines of it in Markdown."""
    return [_row(table.columns), _row(["---"] * len(table.columns)), *map(_row, table.rows)]


def _row(words: Sequence[str]) -> str:
    return "| " + " | ".join(words) + " |"


def flat(items: Iterable[msgspec.Struct]) -> list[dict[str, Any]]:
    """Of each its plain fields, for a CSV file."""
    plain = (bool, int, float, str, type(None))
    found = [msgspec.structs.asdict(one) for one in items]
    return [{name: value for name, value in one.items() if isinstance(value, plain)} for one in found]


def as_csv(records: Sequence[dict[str, Any]]) -> str:
    """A line for each record, which all have the same keys."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def write(path: Path, data: bytes) -> None:
    """An earlier file stays whole until the new one is. Raises PsiKvError."""
    try:
        with whole_file(path) as file:
            file.write(data)
    except OSError as error:
        raise PsiKvError(f"cannot write {path}: {error.strerror}") from error


def check_folder(path: Path) -> None:
    """Make the folder, or say before minutes are spent that nothing can be kept. Raises BadInputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInputError(f"cannot make {path}: {error.strerror}; give another --out-dir") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise BadInputError(f"cannot write into {path}: give an --out-dir that is yours")
