"""The one way in which plots are drawn and written. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psikv_bench.messages import Variant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of Okabe and Ito, set apart by colour-blind readers too.
GREY, DARK, ORANGE, SKY, GREEN = "#9A9A9A", "#333333", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PINK, BROWN = "#0072B2", "#D55E00", "#CC79A7", "#B8860B"
COLOURS: dict[Variant, str] = {
    "fixed": GREY,
    "reference": ORANGE,
    "psi": BLUE,
    "psi-file": SKY,
    "psi-memory": GREEN,
    "file-only": PINK,
}
_DPI = 120
_SHOWN = "25"
"""First digits of the numbers between two powers of ten that are written at the axis."""


def saved(
    path: Path,
    draw: Callable[[Figure, Any], None],
    *,
    size_in: tuple[float, float],
    grid: tuple[int, int] = (1, 1),
    title: str = "",
    **subplots: Any,
) -> str:
    """Draw on a grid of axes, shape (rows, columns), and write it as PNG; gives its name.

    Raises ModuleNotFoundError without matplotlib, OSError where it can't be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size_in, dpi=_DPI, layout="constrained")
    axes = figure.subplots(*grid, squeeze=False, **subplots)
    draw(figure, axes)
    for one in axes.flatten():
        one.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=9, wrap=True)
    figure.savefig(path, format="png")
    return path.name


def legend_above(figure: Figure, columns: int = 3, where: str = "upper") -> None:
    """One legend for all axes, each label once."""
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    place: Any = f"outside {where} center"
    figure.legend(
        handles.values(), handles.keys(), frameon=False, fontsize=8, loc=place,
        ncols=columns,
    )  # fmt: skip


def errors(
    axes: Axes, places: Sequence[float], values: Sequence[Any], scale: float = 1.0, **style: Any
) -> None:
    """Estimates with their intervals: `values` have `mean`, `low` and `high`."""
    means = [scale * value.mean for value in values]
    below = [mean - scale * value.low for mean, value in zip(means, values, strict=True)]
    above = [scale * value.high - mean for mean, value in zip(means, values, strict=True)]
    axes.errorbar(places, means, yerr=(below, above), **style)


def logarithmic(axes: Axes, base: int) -> None:
    """With plain numbers: few readers see 4 times 10 to the 1st as 40."""
    axes.set_yscale("log", base=base)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in _SHOWN else "")
    axes.tick_params(axis="y", which="minor", labelsize=7)


def annotate(axes: Axes, words: str, place: tuple[float, float], above: int = 2) -> None:
    """Words over a point."""
    axes.annotate(words, place, (0, above), textcoords="offset points", ha="center", fontsize=7)
