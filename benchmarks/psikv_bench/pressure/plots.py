"""The variants side by side over one time axis."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from psikv_bench import plots
from psikv_bench.options import in_order
from psikv_bench.pressure.figures import MB, Run
from psikv_bench.pressure.result import SceneResult

_FAINT = 0.25
"""Opacity of the repeats that are not the one shown."""


def median_run(runs: Sequence[Run]) -> Run:
    """The run whose speed is the (lower) median: the one that is shown."""
    return sorted(runs, key=lambda run: run.result.tokens_per_s)[(len(runs) - 1) // 2]


def timeline(folder: Path, runs: Sequence[Run], title: str) -> str:
    """A column a variant: stall, resident memory, cells and token latency."""
    variants = in_order(list({run.variant for run in runs}))

    def draw(figure: Any, grid: Any) -> None:
        for column, variant in enumerate(variants):
            mine = [run for run in runs if run.variant == variant]
            shown = median_run(mine)
            _column(grid[:, column], shown, [run for run in mine if run is not shown])
        for axes in grid[:2, -1]:  # where the restore leaves space
            axes.legend(fontsize=7, frameon=False, loc="center right")
        for axes, label in zip(grid[:, 0], ("stall %", "memory, MB", "cells", "token, ms"), strict=True):
            axes.set_ylabel(label)
        figure.supxlabel(
            "seconds since the neighbour began; bold: the run of median speed, faint: the others; "
            "dotted: the last token",
            fontsize=8.5,
        )

    return plots.saved(
        folder / "timeline.png", draw, size_in=(4.4 * len(variants), 7.5), grid=(4, len(variants)),
        title=title, sharex=True, sharey="row",
    )  # fmt: skip


def _column(column: Sequence[Any], shown: Run, others: Sequence[Run]) -> None:
    stall, memory, cells, latency = column
    killed = ", killed" if shown.result.killed else ""
    title = f"{shown.variant}: {shown.result.tokens_per_s:.1f} tokens/s{killed}"
    stall.set_title(title, loc="left", fontsize=10, fontweight="bold")
    moments = shown.result.moments
    times = [moment.time_s for moment in moments]
    some, full = ([100 * moment.inside[i] if moment.inside else 0.0 for moment in moments] for i in (0, 1))
    outside = [100 * moment.outside.some if moment.outside else 0.0 for moment in moments]
    stall.fill_between(times, some, color=plots.RED, alpha=0.3, linewidth=0)
    stall.plot(times, some, color=plots.RED, linewidth=1.0, label="some, in the cgroup")
    stall.plot(times, full, color="#8C2D04", linewidth=0.9, label="full, in the cgroup")
    stall.plot(times, outside, color=plots.DARK, linewidth=0.7, linestyle=":", label="some, whole machine")
    stall.set_ylim(0, 105)
    colour = plots.COLOURS[shown.variant]
    swapped = [moment.swap_bytes / MB for moment in moments]
    memory.plot(times, swapped, color=plots.PINK, linewidth=1.0, label="in swap")
    plots.logarithmic(latency, base=10)
    for run in (*others, shown):
        bold = run is shown
        style = {"color": colour, "linewidth": 1.5 if bold else 0.8, "alpha": 1.0 if bold else _FAINT}
        moments = run.result.moments
        times = [moment.time_s for moment in moments]
        resident = [moment.resident_bytes / MB for moment in moments]
        memory.plot(times, resident, label="resident" if bold else None, **style)
        cells.plot(times, [moment.live_cells for moment in moments], **style)
        dots = {"color": colour, "markersize": 2.5 if bold else 2.0, "alpha": style["alpha"]}
        latency.plot(*_latencies(run.result), "o" if bold else ".", **dots)
    for axes in column:
        last_s = shown.result.decoding_from_s + shown.result.seconds
        axes.axvline(last_s, color=plots.DARK, linewidth=0.8, linestyle=":")
    memory.set_ylim(bottom=0)
    cells.set_ylim(bottom=0)


def _latencies(found: SceneResult) -> tuple[list[float], list[float]]:
    """When each token ended, and how many milliseconds it took."""
    ends_s = [found.decoding_from_s + end_s for end_s in accumulate(found.token_s)]
    return ends_s, [1e3 * seconds for seconds in found.token_s]
