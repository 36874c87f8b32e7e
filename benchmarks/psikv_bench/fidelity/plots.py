"""Fidelity over the share given up, one line a policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from psikv_bench import plots
from psikv_bench.fidelity.contenders import FULL, RANDOM
from psikv_bench.fidelity.likelihood import ONE_CELL
from psikv_bench.fidelity.plan import Plan
from psikv_bench.fidelity.results import SCENES, Answers, Likelihood, Rows
from psikv_bench.intervals import Interval, Share

_STYLES = ((plots.BLUE, "s"), (plots.SKY, "v"), (plots.PINK, "P"), (plots.ORANGE, "D"), (plots.BROWN, "d"),
           (plots.GREEN, "o"), (plots.RED, "^"), ("#7B3294", "*"), ("#1B7837", "X"))  # fmt: skip
"""Colours and markers of the policies in their order; `random` is grey and dashed."""
_PANEL_IN = (3.9, 3.5)
_SPREAD = 0.012
"""Distance between the points of two policies at one share, so that their intervals can be set apart."""

Estimates = dict[tuple[str, float], Interval | Share]
"""By policy and share."""


class Panel(NamedTuple):
    """One set of axes."""

    title: str
    values: Estimates
    full: float | None = None
    """The full cache's; None where there is none to draw."""
    floor: float | None = None
    """What the arithmetic alone makes of it."""
    logarithmic: bool = False


def draws(rows: Rows) -> Iterator[Callable[[Path], str]]:
    """What draws each plot for which something was measured."""
    over_all = [line for line in rows.likelihood if not line.text]
    if over_all:
        yield partial(_figure, "distributions.png", list(_distributions(over_all)), rows.plan)
    if any(line.share for line in rows.answers):
        yield partial(_figure, "answers.png", list(_answers(rows.answers)), rows.plan)


# -- what is drawn -----------------------------------------------------------------------------------------


def _distributions(lines: Sequence[Likelihood]) -> Iterator[Panel]:
    kl = _values((line, line.kl) for line in lines)
    floor = next(line.kl.mean for line in lines if line.policy == ONE_CELL)
    yield Panel("KL divergence from the full cache, nats", kl, floor=floor, logarithmic=True)
    yield Panel("top-1 agreement with the full cache", _values((line, line.top1) for line in lines), 1.0)
    ratios = _values((line, line.perplexity_ratio) for line in lines)
    yield Panel("perplexity over the full cache's", ratios, 1.0)


def _answers(lines: Sequence[Answers]) -> Iterator[Panel]:
    full = {line.task: line.right.mean for line in lines if line.policy == FULL}
    for task, (when, words) in product(full, SCENES.items()):
        values = _values((line, line.right) for line in lines if (line.task, line.when) == (task, when))
        if values:
            yield Panel(f"{task}, {words}: share right", values, full[task])


def _values(found: Iterable[tuple[Likelihood | Answers, Interval | Share]]) -> Estimates:
    return {(line.policy, line.share): value for line, value in found if line.share}


# -- how ---------------------------------------------------------------------------------------------------


def _figure(name: str, panels: Sequence[Panel], plan: Plan, folder: Path) -> str:
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)

    def draw(figure: Any, grid: Any) -> None:
        for axes in grid.flatten()[len(panels) :]:
            axes.set_axis_off()
        for axes, panel in zip(grid.flatten(), panels, strict=False):
            _panel(axes, panel, plan)
        plots.legend_above(figure, 3 * columns, "lower")

    size_in = (_PANEL_IN[0] * columns, _PANEL_IN[1] * height + 0.6)
    return plots.saved(folder / name, draw, size_in=size_in, grid=(height, columns))


def _panel(axes: Any, panel: Panel, plan: Plan) -> None:
    for place, policy in enumerate(plan.policies):
        shares = [share for share in plan.shares if (policy, share) in panel.values]
        offset = (place - (len(plan.policies) - 1) / 2) * _SPREAD
        colour, marker = _STYLES[place % len(_STYLES)]
        style: dict[str, Any] = {"color": colour, "marker": marker}
        if policy == RANDOM:
            style = {"color": plots.GREY, "marker": "x", "linestyle": "--"}
        plots.errors(
            axes,
            [share + offset for share in shares],
            [panel.values[policy, share] for share in shares],
            markersize=5,
            elinewidth=0.7,
            label=policy,
            **style,
        )
    if panel.full is not None:
        axes.axhline(panel.full, color=plots.DARK, linewidth=1.2, linestyle=(0, (4, 2)), label=FULL)
    least = min(value.low for value in panel.values.values())
    if panel.floor is not None and panel.floor > least / 5:  # far below it would take the space of the others
        axes.axhline(panel.floor, color=plots.DARK, linewidth=1.0, linestyle=":", label=ONE_CELL)
    if panel.logarithmic and least > 0:
        plots.logarithmic(axes, 10)
    axes.set_title(panel.title, loc="left", fontsize=10)
    axes.set_xlabel("share of the context given up", fontsize=9)
    axes.set_xticks(plan.shares, [f"{share:.0%}" for share in plan.shares])
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.7)
