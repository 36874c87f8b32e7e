"""Two plots: the variants over one time axis, and all runs side by side. Needs matplotlib."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from psi_kv_governor.bench.messages import Variant
from psi_kv_governor.bench.pressure import table
from psi_kv_governor.bench.pressure.figures import MB, P99, PEAK, SPEED, WORK, or_all
from psi_kv_governor.bench.pressure.options import VARIANTS
from psi_kv_governor.bench.pressure.result import PressureResult, Run
from psi_kv_governor.bench.record import Figure as Compared
from psi_kv_governor.bench.script import Moment, SceneResult, Shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The colours of Okabe and Ito, told apart by colour-blind readers too.
COLOURS: dict[Variant, str] = {"fixed": "#9A9A9A", "reference": "#E69F00", "psi": "#0072B2"}
_STALL, _FULL, _OUTSIDE, _SWAP = "#D55E00", "#8C2D04", "#555555", "#CC79A7"
_GREY, _ASKED = "#555555", "#009E73"
_DPI = 110
_TITLE_CHARACTERS_PER_IN = 13
_SHOWN = "25"
"""First digits of the numbers between two powers of ten that are written at the axis."""
_COLUMN_IN, _TIMELINE_IN, _RUNS_IN = 4.4, 7.5, 4.0
_FAINT = 0.25
"""Opacity of the repeats that are not the one shown."""


def _variants(result: PressureResult) -> list[Variant]:
    played = {run.variant for run in result.runs}
    return [variant for variant in VARIANTS if variant in played]


def median_run(runs: Sequence[Run]) -> Run:
    """The run whose speed is the (lower) median: the one that is shown."""
    return sorted(runs, key=lambda run: run.result.tokens_per_s)[(len(runs) - 1) // 2]


def timeline(path: Path, result: PressureResult) -> None:
    """A column a variant: stall, resident memory, cells and token latency. Raises OSError."""
    variants = _variants(result)
    figure = Figure(figsize=(_COLUMN_IN * len(variants), _TIMELINE_IN), dpi=_DPI, layout="constrained")
    grid = figure.subplots(4, len(variants), sharex=True, sharey="row", squeeze=False)
    for column, variant in enumerate(variants):
        runs = [run for run in result.runs if run.variant == variant]
        shown = median_run(runs)
        _draw_column([row[column] for row in grid], shown, [run for run in runs if run is not shown])
    for axes in grid[:2, -1]:  # where the restore leaves room
        axes.legend(fontsize=7, frameon=False, loc="center right")
    for axes, label in zip(grid[:, 0], ("stall %", "memory, MB", "cells", "token, ms"), strict=True):
        axes.set_ylabel(label)
    for axes in grid.flatten():
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        "seconds since the neighbour began; bold: the run of median speed, faint: the others; "
        "dotted: the last token",
        fontsize=8.5,
    )
    _title(figure, result)
    figure.savefig(path, format="png")


def _draw_column(column: Sequence[Axes], shown: Run, others: Sequence[Run]) -> None:
    stall, memory, cells, latency = column
    stall.set_title(_column_title(shown), loc="left", fontsize=10, fontweight="bold")
    moments = shown.result.moments
    times = [moment.time_s for moment in moments]
    stall.fill_between(times, _stall(moments, _some), color=_STALL, alpha=0.3, linewidth=0)
    stall.plot(times, _stall(moments, _some), color=_STALL, linewidth=1.0, label="some, in the cgroup")
    stall.plot(times, _stall(moments, _full), color=_FULL, linewidth=0.9, label="full, in the cgroup")
    outside = [100 * moment.outside.some if moment.outside else 0.0 for moment in moments]
    stall.plot(times, outside, color=_OUTSIDE, linewidth=0.7, linestyle=":", label="some, whole machine")
    stall.set_ylim(0, 105)
    colour = COLOURS[shown.variant]
    memory.plot(times, [moment.resident_bytes / MB for moment in moments], color=colour, label="resident")
    memory.plot(
        times, [moment.swap_bytes / MB for moment in moments], color=_SWAP, linewidth=1.0, label="in swap"
    )
    cells.plot(times, [moment.live_cells for moment in moments], color=colour)
    latency.plot(*_latencies(shown.result), "o", color=colour, markersize=2.5)
    _logarithmic(latency, base=10)
    for run in others:
        late = [moment.time_s for moment in run.result.moments]
        resident = [moment.resident_bytes / MB for moment in run.result.moments]
        live = [moment.live_cells for moment in run.result.moments]
        memory.plot(late, resident, color=colour, linewidth=0.8, alpha=_FAINT)
        cells.plot(late, live, color=colour, linewidth=0.8, alpha=_FAINT)
        latency.plot(*_latencies(run.result), ".", color=colour, markersize=2, alpha=_FAINT)
    for axes in column:
        axes.axvline(_last_token_s(shown.result), color=_GREY, linewidth=0.8, linestyle=":")
    memory.set_ylim(bottom=0)
    cells.set_ylim(bottom=0)


def _logarithmic(axes: Axes, base: int) -> None:
    """With plain numbers: few readers see 4 times 10 to the 1st as 40."""
    axes.set_yscale("log", base=base)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:g}"[0] in _SHOWN else "")
    axes.tick_params(axis="y", which="minor", labelsize=7)


def _column_title(run: Run) -> str:
    killed = ", killed" if run.result.killed else ""
    return f"{run.variant}: {run.result.tokens_per_s:.1f} tokens/s{killed}"


def _some(shares: Shares) -> float:
    return shares.some


def _full(shares: Shares) -> float:
    return shares.full


def _stall(moments: Sequence[Moment], which: Callable[[Shares], float]) -> list[float]:
    return [100 * which(moment.inside) if moment.inside else 0.0 for moment in moments]


def _latencies(found: SceneResult) -> tuple[list[float], list[float]]:
    """When each token ended, and how many milliseconds it took."""
    ends_s = [found.decoding_from_s + end_s for end_s in accumulate(found.token_s)]
    return ends_s, [1e3 * seconds for seconds in found.token_s]


def _last_token_s(found: SceneResult) -> float:
    return found.decoding_from_s + found.seconds


_PANELS: tuple[tuple[str, str, Callable[[SceneResult], float]], ...] = (
    (SPEED, "tokens per second", lambda found: found.tokens_per_s),
    (P99, "p99 of a token, ms", lambda found: 1e3 * or_all(found, found.p99_s)),
    (WORK, "neighbour's work, GB/s", lambda found: (found.neighbour_bytes_per_s or 0.0) / 1e9),
    (PEAK, "peak resident, MB", lambda found: found.peak_resident_bytes / MB),
    ("returned", "returned, MB", lambda found: found.bytes_returned / MB),
)


def runs(path: Path, result: PressureResult) -> None:
    """A panel a quantity, a bar (median) and dots (runs) a variant; then the ratios. Raises OSError."""
    ratios = [found for found in table.ratios(result) if found.name.endswith((SPEED, P99, WORK))]
    figure = Figure(
        figsize=(2.3 * len(_PANELS) + 0.55 * len(ratios), _RUNS_IN), dpi=_DPI, layout="constrained"
    )
    widths = [1.0] * len(_PANELS) + ([0.45 + 0.2 * len(ratios)] if ratios else [])
    panels = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths).flatten()
    for axes, (_, label, measure) in zip(panels, _PANELS, strict=False):
        _draw_panel(axes, result, label, measure)
    if ratios:
        _draw_ratios(panels[-1], ratios)
    _title(figure, result)
    figure.savefig(path, format="png")


def _draw_panel(
    axes: Axes, result: PressureResult, label: str, measure: Callable[[SceneResult], float]
) -> None:
    variants = _variants(result)
    for place, variant in enumerate(variants):
        values = [measure(run.result) for run in result.runs if run.variant == variant]
        middle = statistics.median(values)
        axes.bar(place, middle, color=COLOURS[variant], width=0.65)
        axes.plot([place] * len(values), values, "o", color="black", markersize=2.5, alpha=0.7)
        axes.annotate(
            f"{middle:.3g}", (place, 0), (0, 5), textcoords="offset points", ha="center", fontsize=8
        )
    axes.set_xticks(range(len(variants)), variants, fontsize=8.5)
    axes.set_title(label, fontsize=9.5)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_ratios(axes: Axes, ratios: Sequence[Compared]) -> None:
    for place, found in enumerate(ratios):
        axes.plot([place] * len(found.values), found.values, "o", color=_GREY, markersize=3, alpha=0.7)
        axes.plot(place, found.median, "_", color=_STALL, markersize=16, markeredgewidth=2)
        if found.asked is not None:
            axes.plot(place, found.asked.bound, "_", color=_ASKED, markersize=16, markeredgewidth=1.5)
    axes.axhline(1.0, color=_GREY, linewidth=0.7, linestyle=":")
    _logarithmic(axes, base=2)
    names = [found.name.replace(", ", "\n") for found in ratios]
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    axes.set_title("ratios in a repeat (red: median, green: asked)", fontsize=9.5)
    axes.spines[["top", "right"]].set_visible(False)


def _title(figure: Figure, result: PressureResult) -> None:
    words = table.scene_words(result) + ("" if result.complete else " (interrupted)")
    width = int(figure.get_figwidth() * _TITLE_CHARACTERS_PER_IN)
    figure.suptitle(textwrap.fill(words, width), fontsize=9)
