"""Fidelity over the share given up, one line a policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from psikv_bench import plots
from psikv_bench.fidelity.contenders import FULL, RANDOM
from psikv_bench.fidelity.plan import Plan
from psikv_bench.fidelity.results import SCENES, Rows
from psikv_bench.intervals import Interval, Share

_STYLES = ((plots.BLUE, "s"), (plots.SKY, "v"), (plots.PINK, "P"), (plots.ORANGE, "D"), (plots.BROWN, "d"),
           (plots.GREEN, "o"), (plots.RED, "^"), ("#7B3294", "*"), ("#1B7837", "X"))  # fmt: skip
"""Colours and markers of the policies in their order; `random` is grey and dashed."""
_PANEL_IN = (3.9, 3.5)
_SPREAD = 0.012
"""Distance between the points of two policies at one share, so that their intervals can be set apart."""


class Panel(NamedTuple):
    """One set of axes."""

    title: str
    values: Mapping[tuple[str, float], Interval | Share]
    """By policy and share."""
    full: float | None = None
    """The full cache's; None for a divergence, which is drawn in logarithms."""


def draws(rows: Rows) -> Iterator[Callable[[Path], str]]:
    """What draws each plot for which something was measured."""
    panels = {"distributions.png": list(_distributions(rows)), "answers.png": list(_answers(rows))}
    for name, of in panels.items():
        if of:
            yield partial(_figure, name, of, rows.plan)


def _distributions(rows: Rows) -> Iterator[Panel]:
    lines = {(line.policy, line.share): line for line in rows.likelihood if line.share and not line.text}
    if lines:
        yield Panel("KL divergence, nats", {case: line.kl for case, line in lines.items()})
        yield Panel("top-1 agreement", {case: line.top1 for case, line in lines.items()}, 1.0)
        ratios = {case: line.perplexity_ratio for case, line in lines.items()}
        yield Panel("perplexity over the full cache's", ratios, 1.0)


def _answers(rows: Rows) -> Iterator[Panel]:
    full = {line.task: line.right.mean for line in rows.answers if line.policy == FULL}
    for task, (when, words) in product(full, SCENES.items()):
        lines = [line for line in rows.answers if line.share and (line.task, line.when) == (task, when)]
        if lines:
            values = {(line.policy, line.share): line.right for line in lines}
            yield Panel(f"{task}, {words}: share right", values, full[task])


def _figure(name: str, panels: Sequence[Panel], plan: Plan, folder: Path) -> str:
    columns = min(3, len(panels))
    height = math.ceil(len(panels) / columns)

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
        values = [panel.values[policy, share] for share in shares]
        places = [share + offset for share in shares]
        plots.errors(axes, places, values, markersize=5, elinewidth=0.7, label=policy, **style)
    if panel.full is not None:
        axes.axhline(panel.full, color=plots.DARK, linestyle="--", label=FULL)
    elif all(value.low > 0 for value in panel.values.values()):
        plots.logarithmic(axes, 10)
    axes.set_title(panel.title, loc="left", fontsize=10)
    axes.set_xlabel("share of the context given up", fontsize=9)
    axes.set_xticks(plan.shares, [f"{share:.0%}" for share in plan.shares])
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.7)
