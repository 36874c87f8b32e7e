"""Two plots: the variants over one time axis, and all runs side by side."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from psi_kv_governor.sandbox.messages import Variant
from psi_kv_governor.sandbox.result import SceneResult
from psikv_bench import plots
from psikv_bench.figures import Figure
from psikv_bench.options import in_order
from psikv_bench.pressure.figures import COLUMNS, MB, P99, PEAK, RATIOS, SPEED, WORK, Run

_FAINT = 0.25
"""Opacity of the repeats that are not the one shown."""
_PANELS = (SPEED, P99, WORK, PEAK, "returned")


def _variants(runs: Sequence[Run]) -> list[Variant]:
    return in_order(list({run.variant for run in runs}))


def median_run(runs: Sequence[Run]) -> Run:
    """The run whose speed is the (lower) median: the one that is shown."""
    return sorted(runs, key=lambda run: run.result.tokens_per_s)[(len(runs) - 1) // 2]


def timeline(folder: Path, runs: Sequence[Run], title: str) -> str:
    """A column a variant: stall, resident memory, cells and token latency."""
    variants = _variants(runs)

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


def side_by_side(folder: Path, runs: Sequence[Run], figures: Sequence[Figure], title: str) -> str:
    """A panel a quantity, with a column (median) and dots (runs) a variant; then the ratios."""
    ratios = [found for found in figures if found.case == RATIOS and found.name.endswith((SPEED, P99, WORK))]
    widths = [1.0] * len(_PANELS) + ([0.45 + 0.2 * len(ratios)] if ratios else [])

    def draw(_figure: Any, grid: Any) -> None:
        for axes, name in zip(grid[0], _PANELS, strict=False):
            _panel(axes, runs, name)
        if ratios:
            _draw_ratios(grid[0, -1], ratios)

    size_in = (2.3 * len(_PANELS) + 0.55 * len(ratios), 4.0)
    return plots.saved(
        folder / "runs.png", draw, size_in=size_in, grid=(1, len(widths)), title=title, width_ratios=widths
    )


def _panel(axes: Any, runs: Sequence[Run], name: str) -> None:
    unit, measure = next((unit, measure) for label, unit, measure in COLUMNS if label == name)
    variants = _variants(runs)
    for place, variant in enumerate(variants):
        values = [measure(run.result) or 0.0 for run in runs if run.variant == variant]
        middle = statistics.median(values)
        axes.bar(place, middle, color=plots.COLOURS[variant], width=0.65)
        axes.plot([place] * len(values), values, "o", color="black", markersize=2.5, alpha=0.7)
        plots.annotate(axes, f"{middle:.3g}", (place, 0), above=5)
    axes.set_xticks(range(len(variants)), variants, fontsize=8.5)
    axes.set_title(name if unit in name else f"{name}, {unit}", fontsize=9.5)


def _draw_ratios(axes: Any, ratios: Sequence[Figure]) -> None:
    for place, found in enumerate(ratios):
        axes.plot([place] * len(found.values), found.values, "o", color=plots.DARK, markersize=3, alpha=0.7)
        axes.plot(place, found.median, "_", color=plots.RED, markersize=16, markeredgewidth=2)
        if found.asked is not None:
            axes.plot(place, found.asked.bound, "_", color=plots.GREEN, markersize=16, markeredgewidth=1.5)
    axes.axhline(1.0, color=plots.DARK, linewidth=0.7, linestyle=":")
    plots.logarithmic(axes, base=2)
    names = [found.name.replace(", ", "\n") for found in ratios]
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    axes.set_title("ratios in a repeat (red: median, green: asked)", fontsize=9.5)
