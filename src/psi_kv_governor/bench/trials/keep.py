"""What the trials begin with and report, and how it is kept: result.json, summary.md, a CSV file, plots."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from psi_kv_governor.bench.pen import Pen, Swap
from psi_kv_governor.bench.record import Figure, Header, Recorder, check_folder
from psi_kv_governor.bench.trials.journal import Journal, Plan
from psi_kv_governor.errors import PsiKvError

_T = TypeVar("_T")


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of words, as they are printed and written."""

    title: str
    columns: list[str]
    rows: list[list[str]]


class TrialsReport(msgspec.Struct, frozen=True, kw_only=True):
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
    """The same as the tables, as numbers."""

    @classmethod
    def of(cls, recorder: Recorder, figures: Sequence[Figure], **rest: Any) -> TrialsReport:
        """The report of what `recorder` saw the machine do; `rest` are the fields that say the most."""
        judged = recorder.report(figures)
        return cls(header=judged.header, passed=judged.passed, figures=judged.figures, **rest)

    def missed(self) -> list[Figure]:
        """The figures that miss what was asked."""
        return [found for found in self.figures if found.passed is False]

    def to_json(self) -> bytes:
        """Indented, for files that are read and compared."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"


def opened(
    folder: Path | None, name: str, plan: Plan, kind: type[_T], *, swap: Swap = "none", resume: bool
) -> Journal[_T]:
    """The journal of a run that is possible here: with what `folder` holds of it, or in memory alone.

    Raises BadInputError for a folder that can't be used, PsiKvError where no memory cgroup can be made.
    """
    able, why = Pen.available(swap)
    if not able:
        raise PsiKvError(f"this needs a memory cgroup of its own: {why}")
    if folder is not None:
        check_folder(folder)
    return Journal(folder and folder / name, plan, kind, go_on=resume)


def save(
    report: TrialsReport, folder: Path, csv_name: str, records: Sequence[dict[str, Any]], draw: Draw
) -> None:
    """Write all files. Raises PsiKvError where one can't be written.

    Without matplotlib there are no plots, and the summary says so.
    """
    notes = [*report.notes, *draw(folder)]
    report = msgspec.structs.replace(report, notes=notes)
    _write(folder / "result.json", report.to_json())
    _write(folder / "summary.md", markdown(report).encode())
    _write(folder / csv_name, _csv(records).encode())


Draw = Callable[[Path], list[str]]
"""Draws into a folder; gives what could not be drawn and why."""


def markdown(report: TrialsReport) -> str:
    """The report as it is read."""
    header = report.header
    lines = [f"# psi-kv bench {header.bench}", ""]
    if report.interrupted:
        lines += ["Interrupted: what was finished until then.", ""]
    for table in report.tables:
        lines += [f"## {table.title}", "", _row(table.columns), _row(["---"] * len(table.columns))]
        lines += [*map(_row, table.rows), ""]
    lines += ["## Verdict", "", *(f"- {verdict(found)}" for found in report.figures), ""]
    lines += [f"- {note}" for note in report.notes]
    machine = header.machine
    lines += [
        "",
        f"`{header.command}`, {header.started_utc}, {header.seconds:.0f} s; {header.model}, "
        f"{', '.join(map(str, header.threads))} of {machine.cores} cores, {machine.processor}, "
        f"{machine.memory_bytes >> 20} MiB, {machine.kernel}; "
        + ", ".join(f"{name} {version}" for name, version in header.versions.items())
        + f"; load {header.load_before:.2f} before, {header.load_after:.2f} after",
    ]
    return "\n".join(lines) + "\n"


def verdict(found: Figure) -> str:
    """One figure beside what was asked, in a line."""
    case = f" ({found.case})" if found.case else ""
    value = getattr(found, found.asked.statistic if found.asked else "median")
    told = _told(value, found.unit)
    told += f" {found.unit}" if found.unit != "share" else ""
    spread = ""
    if len(found.values) > 1:
        spread = f", {_told(found.min, found.unit)} to {_told(found.max, found.unit)}"
    asked = f"; asked {found.asked.sign} {_told(found.asked.bound, found.unit)}" if found.asked else ""
    passed = {True: "pass: ", False: "MISSED: ", None: ""}[found.passed]
    return f"{passed}{found.name}{case}: {told}{spread}{asked}"


def _told(value: float, unit: str) -> str:
    return f"{value:.0%}" if unit == "share" else f"{value:.4g}"


def _row(words: Sequence[str]) -> str:
    return "| " + " | ".join(words) + " |"


def _csv(records: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    if records:
        writer = csv.DictWriter(text, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return text.getvalue()


def _write(path: Path, data: bytes) -> None:
    """An earlier file stays whole until the new one is."""
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_bytes(data)
        new.replace(path)
    except OSError as error:
        raise PsiKvError(f"cannot write {path}: {error.strerror}") from error
