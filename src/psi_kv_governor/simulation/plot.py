"""Runs as small multiples: stall, headroom and cells of each over one time axis, with what was done."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.simulation.outcome import Outcome
from psi_kv_governor.simulation.run import Track

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

# The colours of Okabe and Ito, told apart by colour-blind readers too.
STALL, UNGOVERNED, HEADROOM = "#D55E00", "#9A9A9A", "#0072B2"
LIVE, MASKED, LOST = "#56B4E9", "#E69F00", "#444444"
TRIM, RESTORE = "#B2182B", "#1B7837"

COLUMNS = 3
WIDTH_IN, HEIGHT_IN, LEGEND_LINE_IN = 4.8, 3.9, 0.35
LEGEND_COLUMNS = 3
"""Entries of the legend that fit above one column of panels."""
DPI = 110


def check_plotting(path: Path) -> None:
    """Raises BadInputError, saying what to install, where matplotlib is missing; and where there is no such
    folder: at once, and not after the runs."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BadInputError("plotting needs matplotlib: pip install matplotlib") from None
    if not path.parent.is_dir():
        raise BadInputError(f"cannot write the plot {path}: {os.strerror(errno.ENOENT)}")


def save_plot(path: Path, runs: Sequence[tuple[Outcome, Track]], config: GovernorConfig) -> None:
    """Write a PNG with one panel a run. Raises BadInputError where it cannot be made or written."""
    check_plotting(path)
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(runs))
    rows = -(-len(runs) // columns)
    legend_in = LEGEND_LINE_IN * -(-LEGEND_COLUMNS // columns)
    size = (WIDTH_IN * columns, HEIGHT_IN * rows + legend_in)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    legend, body = figure.subfigures(
        2, 1, squeeze=False, height_ratios=(legend_in, HEIGHT_IN * rows)
    ).flatten()
    panels = body.subfigures(rows, columns, squeeze=False, wspace=0.03, hspace=0.03).flatten()
    for panel, (outcome, track) in zip(panels, runs, strict=False):
        _draw(panel, outcome, track, config)
    compared = any(track.stall_ungoverned for _, track in runs)
    _draw_legend(legend, LEGEND_COLUMNS * columns, compared=compared)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise BadInputError(f"cannot write the plot {path}: {error.strerror}") from error


def _draw(panel: SubFigure, outcome: Outcome, track: Track, config: GovernorConfig) -> None:
    stall, headroom, cells = panel.subplots(3, 1, sharex=True, height_ratios=(1.0, 1.0, 1.5))
    stall.set_title(outcome.scenario, loc="left", fontsize=11, fontweight="bold")
    stall.set_title(outcome.about, loc="right", fontsize=7.5, color="#555555")
    _draw_stall(stall, track, config)
    _draw_headroom(headroom, track, config)
    _draw_cells(cells, outcome, track)
    for axes in (stall, headroom, cells):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.margins(x=0)
    cells.set_xlabel("seconds", fontsize=8)
    panel.align_ylabels((stall, headroom, cells))


def _draw_stall(axes: Axes, track: Track, config: GovernorConfig) -> None:
    if track.stall_ungoverned:
        axes.plot(track.time_s, _percent(track.stall_ungoverned), color=UNGOVERNED, linewidth=0.9)
    axes.fill_between(track.time_s, _percent(track.stall), color=STALL, alpha=0.25, linewidth=0)
    axes.plot(track.time_s, _percent(track.stall), color=STALL, linewidth=1.0)
    axes.axhline(config.high * 100, color=STALL, linewidth=0.7, linestyle=(0, (4, 3)))
    axes.set_ylim(0, 105)
    axes.set_yticks([0, 50, 100])
    axes.set_ylabel("stall %", fontsize=8)


def _draw_headroom(axes: Axes, track: Track, config: GovernorConfig) -> None:
    axes.plot(track.time_s, _percent(track.headroom), color=HEADROOM, linewidth=1.0)
    axes.axhline(config.headroom_low * 100, color=HEADROOM, linewidth=0.7, linestyle=(0, (4, 3)))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("headroom %", fontsize=8)


def _draw_cells(axes: Axes, outcome: Outcome, track: Track) -> None:
    axes.stackplot(
        track.time_s,
        track.live_cells,
        track.masked_cells,
        track.lost_cells,
        colors=(LIVE, MASKED, LOST),
        linewidth=0,
        alpha=0.75,
    )
    top = max(map(sum, zip(track.live_cells, track.masked_cells, track.lost_cells, strict=True)), default=1)
    for action, marker, colour in (("trim", "v", TRIM), ("restore", "^", RESTORE)):
        times = [act.time_s for act in outcome.acts if act.action == action]
        axes.vlines(times, 0, top * 1.04, color=colour, linewidth=0.5, alpha=0.6)
        axes.plot(times, [top * 1.09] * len(times), marker, color=colour, markersize=4.5, linestyle="none")
    axes.set_ylim(0, top * 1.18)
    axes.set_ylabel("cells", fontsize=8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _draw_legend(panel: SubFigure, entries: int, *, compared: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Line2D([], [], color=STALL, label="stall"),
        Line2D([], [], color=HEADROOM, label="headroom"),
        Line2D([], [], color="#555555", linestyle=(0, (4, 3)), linewidth=0.8, label="thresholds"),
        Patch(color=LIVE, alpha=0.75, label="live"),
        Patch(color=MASKED, alpha=0.75, label="masked"),
        Patch(color=LOST, alpha=0.75, label="lost"),
        Line2D([], [], color=TRIM, marker="v", linestyle="none", label="trim"),
        Line2D([], [], color=RESTORE, marker="^", linestyle="none", label="restore"),
    ]
    if compared:
        handles.insert(1, Line2D([], [], color=UNGOVERNED, label="stall, ungoverned"))
    panel.legend(
        handles=handles,
        loc="center",
        ncols=entries,
        fontsize=8.5,
        frameon=False,
        columnspacing=1.4,
        handlelength=1.6,
    )


def _percent(shares: Sequence[float]) -> list[float]:
    return [100.0 * share for share in shares]
