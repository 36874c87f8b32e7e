"""Writes result.json, samples.csv, summary.md and the plots."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from psi_kv_governor.bench.pressure import table
from psi_kv_governor.bench.pressure.folder import RESULT
from psi_kv_governor.bench.pressure.result import PressureResult, Run
from psi_kv_governor.bench.script import Moment, Shares
from psi_kv_governor.errors import PsiKvError

SAMPLES, SUMMARY, TIMELINE, RUNS = "samples.csv", "summary.md", "timeline.png", "runs.png"

_CSV_COLUMNS = (
    "time_s", "run", "variant", "stage", "inside_some", "inside_full", "outside_some", "outside_full",
    "resident_bytes", "swap_bytes", "cells", "tokens", "token_s", "neighbour_bytes",
)  # fmt: skip


def save(folder: Path, result: PressureResult) -> None:
    """Write figures and samples; an earlier state stays whole until the new one is. Raises PsiKvError."""
    _write(folder / RESULT, result.to_json())
    _write(folder / SAMPLES, samples_csv(result.runs).encode())
    _write(folder / SUMMARY, summary(result).encode())


def save_plots(folder: Path, result: PressureResult) -> list[Path]:
    """Draw what there is; nothing without matplotlib or a finished run. Raises PsiKvError."""
    if not result.runs:
        return []
    try:
        from psi_kv_governor.bench.pressure import plots
    except ImportError:
        return []
    paths = [folder / TIMELINE, folder / RUNS]
    try:
        plots.timeline(paths[0], result)
        plots.runs(paths[1], result)
    except OSError as error:
        raise PsiKvError(f"cannot write the plots to {folder}: {error.strerror}") from error
    return paths


def _write(path: Path, data: bytes) -> None:
    new = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(data)
        new.replace(path)
    except OSError as error:
        raise PsiKvError(f"cannot write {path}: {error.strerror}") from error


def samples_csv(runs: Sequence[Run]) -> str:
    """A line for each look. Time 0 is the neighbour's beginning; empty where nobody tells."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for run in runs:
        writer.writerows(_csv_row(run, moment) for moment in run.result.moments)
    return text.getvalue()


def _csv_row(run: Run, moment: Moment) -> list[object]:
    return [
        f"{moment.time_s:.3f}",
        run.number,
        run.variant,
        moment.stage,
        *_csv_shares(moment.inside),
        *_csv_shares(moment.outside),
        moment.resident_bytes,
        moment.swap_bytes,
        moment.live_cells,
        moment.tokens,
        "" if moment.token_s is None else f"{moment.token_s:.4f}",
        moment.neighbour_bytes,
    ]


def _csv_shares(found: Shares | None) -> tuple[str, str]:
    return ("", "") if found is None else (f"{found.some:.4f}", f"{found.full:.4f}")


def summary(result: PressureResult) -> str:
    """The report in Markdown."""
    return "\n".join(_summary(result)) + "\n"


def _summary(result: PressureResult) -> Iterator[str]:
    yield "# The pressure benchmark"
    if not result.complete:
        yield f"\n**Not complete:** interrupted after {len(result.runs)} runs."
    for remark in result.remarks:
        yield f"\n**{remark}**"
    yield f"\n![The variants side by side]({RUNS})\n\n![Over time]({TIMELINE})"
    head, rows = table.medians(result)
    yield from _markdown("Medians", head, rows)
    compared = [[found.name, table.spread(found)] for found in table.ratios(result)]
    yield from _markdown("Ratios within a repeat", ["", "median (min to max)"], compared)
    yield "\n## What was asked\n"
    verdicts = list(table.verdicts(result))
    yield from (f"- {line}" for line in verdicts or ["nothing: see the remark above"])
    yield from _markdown("Runs", table.COLUMNS, map(table.row, result.runs))
    yield "\n## Circumstances\n"
    yield from (f"- {line}" for line in table.circumstances(result))


def _markdown(title: str, head: Sequence[str], rows: Iterator[list[str]] | list[list[str]]) -> Iterator[str]:
    yield f"\n## {title}\n"
    yield _line(head)
    yield _line(["---"] * len(head))
    yield from map(_line, rows)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
