"""The plot of the README: `python benchmarks/plot_scene.py data/bench/scene.json docs/scene.png`.

Reads what `psi-kv bench scene --out FILE` recorded; each dot is one run, each bar the median of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_PANELS = (
    ("speed", "tokens per second"),
    ("p99", "p99 of a token, ms"),
    ("most in swap", "most in swap, MB"),
)
_COLOURS = {"ungoverned": "#b0b0b0", "governed": "#2a7f62"}


def main(source: Path, target: Path) -> None:
    """Draw one panel a figure, the two variants side by side."""
    figures = {(f["case"], f["name"]): f["values"] for f in json.loads(source.read_text())["figures"]}
    figure, axes = plt.subplots(1, len(_PANELS), figsize=(9, 3), layout="constrained")
    for axis, (name, label) in zip(axes, _PANELS, strict=True):
        for place, (variant, colour) in enumerate(_COLOURS.items()):
            values = figures[variant, name]
            axis.bar(place, median(values), color=colour, width=0.6)
            axis.plot([place] * len(values), values, "o", color="black", markersize=3)
            axis.annotate(
                f"{median(values):.3g}", (place, 0), (0, 6), textcoords="offset points", ha="center"
            )
        axis.set_xticks(range(len(_COLOURS)), list(_COLOURS))
        axis.set_title(label, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
