"""Fidelity over the share given up, one line a policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from psikv_bench import plots
from psikv_bench.fidelity.contenders import FULL, RANDOM
from psikv_bench.fidelity.likelihood import ONE_CELL
from psikv_bench.fidelity.results import Likelihood, Rows
from psikv_bench.intervals import Interval, Share

_COLOURS = {
    "window": plots.BLUE,
    "fifo": plots.SKY,
    "lru": plots.PINK,
    "keynorm": plots.ORANGE,
    "keydiff": plots.BROWN,
    "attention": plots.GREEN,
    "hybrid": plots.RED,
    RANDOM: plots.GREY,
    FULL: plots.DARK,
}
_SPARE_COLOURS = ("#7B3294", "#A6611A", "#1B7837", "#B2182B")
"""Of policies that others brought."""
_MARKERS = {"window": "s", "fifo": "v", "lru": "P", "keynorm": "D", "keydiff": "d", "attention": "o",
            "hybrid": "^", RANDOM: "x"}  # fmt: skip
_PANEL_IN = (3.9, 3.5)
_SPREAD = 0.012
"""Distance between the points of two policies at one share, so that their intervals can be set apart."""

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


def draws(rows: Rows) -> Iterator[Callable[[Path], str]]:
    """What draws each plot for which something was measured."""
    for name, panels in (
        ("distributions.png", list(_distributions(rows))),
        ("texts.png", list(_texts(rows))),
        ("answers.png", list(_answers(rows))),
    ):
        if panels:
            yield partial(_figure, name=name, panels=panels, rows=rows)


# -- what is drawn -----------------------------------------------------------------------------------------


def _distributions(rows: Rows) -> Iterator[Panel]:
    lines = [line for line in rows.likelihood if not line.text and not line.ctx]
    if not lines:
        return
    floor = next((line.kl.mean for line in lines if line.policy == ONE_CELL), None)
    yield Panel("KL divergence from the full cache, nats", _by(lines, lambda line: line.kl), None,
                share=False, floor=floor, logarithmic=True)  # fmt: skip
    yield Panel("top-1 agreement with the full cache", _by(lines, lambda line: line.top1), 1.0, share=True)
    yield Panel("perplexity over the full cache's", _by(lines, lambda line: line.perplexity_ratio), 1.0,
                share=False)  # fmt: skip


def _texts(rows: Rows) -> Iterator[Panel]:
    for text in rows.setting.texts:
        lines = [line for line in rows.likelihood if line.text == text.name and not line.ctx]
        if lines:
            title = f"{text.name}: KL divergence, nats"
            yield Panel(title, _by(lines, lambda line: line.kl), None, share=False, logarithmic=True)


def _by(
    lines: Sequence[Likelihood], value: Callable[[Likelihood], Interval]
) -> dict[tuple[str, float], Estimate]:
    return {(line.policy, line.share): value(line) for line in lines if line.share}


def _answers(rows: Rows) -> Iterator[Panel]:
    full = {task.name: task.full.mean for task in rows.tasks}
    scenes = {"known": "question known", "later": "question later"}
    for task in dict.fromkeys(line.task for line in rows.retrieval):
        for when, words in scenes.items():
            values: dict[tuple[str, float], Estimate] = {
                (line.policy, line.share): line.all
                for line in rows.retrieval
                if (line.task, line.when) == (task, when)
            }
            if values:
                yield Panel(f"{task}, {words}: right", values, full.get(task), share=True)
    chats = {line.policy: line for line in rows.conversation if line.policy == FULL}
    talked: dict[tuple[str, float], Estimate] = {
        (line.policy, line.share): line.right for line in rows.conversation if line.share
    }
    if talked:
        yield Panel("chat: right", talked, chats[FULL].right.mean if FULL in chats else None, share=True)


# -- how ---------------------------------------------------------------------------------------------------


def _figure(folder: Path, name: str, panels: Sequence[Panel], rows: Rows) -> str:
    columns = min(3, len(panels)) if len(panels) != 4 else 2
    height = -(-len(panels) // columns)

    def draw(figure: Any, grid: Any) -> None:
        for axes, panel in zip(grid.flatten(), panels, strict=False):
            _panel(axes, panel, rows)
        for axes in grid.flatten()[len(panels) :]:
            axes.set_axis_off()
        plots.legend_above(figure, 3 * columns, "lower")

    size_in = (_PANEL_IN[0] * columns, _PANEL_IN[1] * height + 0.6)
    return plots.saved(folder / name, draw, size_in=size_in, grid=(height, columns))


def _panel(axes: Any, panel: Panel, rows: Rows) -> None:
    policies = rows.setting.policies
    for place, policy in enumerate(policies):
        offset = (place - (len(policies) - 1) / 2) * _SPREAD
        points = [
            (share + offset, panel.values[policy, share])
            for share in rows.setting.shares
            if (policy, share) in panel.values
        ]
        if points:
            _line(axes, policy, _colour(policy, policies), points)
    if panel.full is not None:
        axes.axhline(panel.full, color=_COLOURS[FULL], linewidth=1.2, linestyle=(0, (4, 2)), label=FULL)
    # A floor far below would take the space of what is to be seen.
    if panel.floor is not None and panel.floor > min(value.low for value in panel.values.values()) / 5:
        axes.axhline(panel.floor, color=_COLOURS[FULL], linewidth=1.0, linestyle=":", label=ONE_CELL)
    axes.set_title(panel.title, loc="left", fontsize=10)
    axes.set_xlabel("share of the context given up", fontsize=9)
    axes.set_xticks(rows.setting.shares, [f"{share:.0%}" for share in rows.setting.shares])
    axes.tick_params(labelsize=9)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    _scale(axes, panel)


def _scale(axes: Any, panel: Panel) -> None:
    if panel.logarithmic and all(value.mean > 0 for value in panel.values.values()):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
    if panel.share:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        if min(value.mean for value in panel.values.values()) < 0.6:
            axes.set_ylim(-0.03, 1.05)


def _line(axes: Any, policy: str, colour: str, points: Sequence[tuple[float, Estimate]]) -> None:
    plots.errors(
        axes,
        [place for place, _ in points],
        [value for _, value in points],
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
