"""Fidelity over the share given up, one line a policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from psikv_bench.fidelity.contenders import FULL, RANDOM
from psikv_bench.fidelity.intervals import Interval, Share
from psikv_bench.fidelity.likelihood import ONE_CELL
from psikv_bench.fidelity.results import FidelityReport, Likelihood

from psi_kv_governor.errors import PsiKvError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of Okabe and Ito, told apart by colour-blind readers too; the bounds are grey.
_COLOURS = {
    "window": "#0072B2",
    "fifo": "#56B4E9",
    "lru": "#CC79A7",
    "keynorm": "#E69F00",
    "keydiff": "#B8860B",
    "attention": "#009E73",
    "hybrid": "#D55E00",
    RANDOM: "#8A8A8A",
    FULL: "#333333",
}
_SPARE_COLOURS = ("#7B3294", "#A6611A", "#1B7837", "#B2182B")
"""Of policies that others brought."""
_MARKERS = {"window": "s", "fifo": "v", "lru": "P", "keynorm": "D", "keydiff": "d", "attention": "o",
            "hybrid": "^", RANDOM: "x"}  # fmt: skip
_DPI = 130
_PANEL_IN = (3.9, 3.5)
_SPREAD = 0.012
"""Distance between the points of two policies at one share, so that their intervals can be told apart."""

Estimate = Interval | Share


class Panel(NamedTuple):
    """One set of axes."""

    title: str
    values: dict[tuple[str, float], Estimate]
    """By policy and share."""
    full: float | None
    """The upper bound; None where there is none to draw."""
    share: bool
    """Whether the values are shares, shown in percent."""
    floor: float | None = None
    """What the arithmetic alone makes of it."""
    logarithmic: bool = False


def draw(report: FidelityReport, folder: Path) -> list[str]:
    """Write the plots for what was measured into `folder`; gives their names.

    Raises PsiKvError where matplotlib is missing or the folder can't be written.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PsiKvError("plotting needs matplotlib: pip install 'psi-kv-governor[plot]'") from None
    drawn = []
    for name, panels in (
        ("distributions.png", list(_distributions(report))),
        ("texts.png", list(_texts(report))),
        ("answers.png", list(_answers(report))),
    ):
        if panels:
            _save(_figure(panels, report), folder / name)
            drawn.append(name)
    return drawn


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise PsiKvError(f"cannot write the plot {path}: {error.strerror}") from error


# -- what is drawn -----------------------------------------------------------------------------------------


def _distributions(report: FidelityReport) -> Iterator[Panel]:
    lines = [line for line in report.likelihood if not line.text and not line.ctx]
    if not lines:
        return
    floor = next((line.kl.mean for line in lines if line.policy == ONE_CELL), None)
    yield Panel("KL divergence from the full cache, nats", _by(lines, lambda line: line.kl), None,
                share=False, floor=floor, logarithmic=True)  # fmt: skip
    yield Panel("top-1 agreement with the full cache", _by(lines, lambda line: line.top1), 1.0, share=True)
    yield Panel("perplexity over the full cache's", _by(lines, lambda line: line.perplexity_ratio), 1.0,
                share=False)  # fmt: skip


def _texts(report: FidelityReport) -> Iterator[Panel]:
    for text in report.setting.texts:
        lines = [line for line in report.likelihood if line.text == text.name and not line.ctx]
        if lines:
            title = f"{text.name}: KL divergence, nats"
            yield Panel(title, _by(lines, lambda line: line.kl), None, share=False, logarithmic=True)


def _by(
    lines: Sequence[Likelihood], value: Callable[[Likelihood], Interval]
) -> dict[tuple[str, float], Estimate]:
    return {(line.policy, line.share): value(line) for line in lines if line.share}


def _answers(report: FidelityReport) -> Iterator[Panel]:
    full = {task.name: task.full.mean for task in report.tasks}
    scenes = {"known": "question known", "later": "question later"}
    for task in dict.fromkeys(line.task for line in report.retrieval):
        for when, words in scenes.items():
            values: dict[tuple[str, float], Estimate] = {
                (line.policy, line.share): line.all
                for line in report.retrieval
                if (line.task, line.when) == (task, when)
            }
            if values:
                yield Panel(f"{task}, {words}: right", values, full.get(task), share=True)
    chats = {line.policy: line for line in report.conversation if line.policy == FULL}
    talked: dict[tuple[str, float], Estimate] = {
        (line.policy, line.share): line.right for line in report.conversation if line.share
    }
    if talked:
        yield Panel("chat: right", talked, chats[FULL].right.mean if FULL in chats else None, share=True)


# -- how ---------------------------------------------------------------------------------------------------


def _figure(panels: Sequence[Panel], report: FidelityReport) -> Figure:
    from matplotlib.figure import Figure

    columns = min(3, len(panels)) if len(panels) != 4 else 2
    rows = -(-len(panels) // columns)
    figure = Figure(
        figsize=(_PANEL_IN[0] * columns, _PANEL_IN[1] * rows + 0.6), dpi=_DPI, layout="constrained"
    )
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        _panel(axes, panel, report)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    handles = {
        label: handle
        for axes in grid
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 3 * columns),
        frameon=False, fontsize=9,
    )  # fmt: skip
    return figure


def _panel(axes: Axes, panel: Panel, report: FidelityReport) -> None:
    policies = report.setting.policies
    for place, policy in enumerate(policies):
        offset = (place - (len(policies) - 1) / 2) * _SPREAD
        points = [
            (share + offset, panel.values[policy, share])
            for share in report.setting.shares
            if (policy, share) in panel.values
        ]
        if points:
            _line(axes, policy, _colour(policy, policies), points)
    if panel.full is not None:
        axes.axhline(panel.full, color=_COLOURS[FULL], linewidth=1.2, linestyle=(0, (4, 2)), label=FULL)
    # A floor far below would take the room of what is to be seen.
    if panel.floor is not None and panel.floor > min(value.low for value in panel.values.values()) / 5:
        axes.axhline(panel.floor, color=_COLOURS[FULL], linewidth=1.0, linestyle=":", label=ONE_CELL)
    axes.set_title(panel.title, loc="left", fontsize=10)
    axes.set_xlabel("share of the context given up", fontsize=9)
    axes.set_xticks(report.setting.shares, [f"{share:.0%}" for share in report.setting.shares])
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    _scale(axes, panel)


def _scale(axes: Axes, panel: Panel) -> None:
    if panel.logarithmic and all(value.mean > 0 for value in panel.values.values()):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
    if panel.share:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        if min(value.mean for value in panel.values.values()) < 0.6:
            axes.set_ylim(-0.03, 1.05)


def _line(axes: Axes, policy: str, colour: str, points: Sequence[tuple[float, Estimate]]) -> None:
    values = [value for _, value in points]
    spread = [[value.mean - value.low for value in values], [value.high - value.mean for value in values]]
    axes.errorbar(
        [place for place, _ in points],
        [value.mean for value in values],
        yerr=spread,
        color=colour,
        marker=_MARKERS.get(policy, "*"),
        markersize=5,
        linewidth=1.0 if policy == RANDOM else 1.5,
        linestyle="--" if policy == RANDOM else "-",
        elinewidth=0.7,
        capsize=0,
        label=policy,
    )


def _colour(policy: str, policies: Sequence[str]) -> str:
    if policy in _COLOURS:
        return _COLOURS[policy]
    others = [name for name in policies if name not in _COLOURS]
    return _SPARE_COLOURS[others.index(policy) % len(_SPARE_COLOURS)]
