"""Draws one pair of runs. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from psi_kv_governor.sandbox.load import MIB
from psikv_bench.plots import GREEN, RED, saved
from psikv_bench.server.asking import Run


def plot(folder: Path, runs: Sequence[Run], limit_bytes: int) -> str:
    """Memory over time and time to first token, ungoverned and governed; gives the file's name."""

    def draw(_figure: Any, grid: Any) -> None:
        memory, times = grid[:, 0]
        for run in runs:
            name, colour = ("governed", GREEN) if run.governed else ("ungoverned", RED)
            at_s = [sample.time_s for sample in run.usage]
            memory.plot(at_s, [one.usage_bytes / MIB for one in run.usage], color=colour, label=name)
            if run.died and at_s:
                memory.plot(at_s[-1], limit_bytes / MIB, "x", color=colour, markersize=12)
            for kind, mark in (("first", "o"), ("return", "v")):
                asked = [(one.time_s, one.first_token_s) for one in run.requests if one.kind == kind]
                if asked:
                    times.semilogy(*zip(*asked, strict=True), mark, color=colour, label=f"{name}: {kind}")
        memory.axhline(limit_bytes / MIB, color="black", linestyle="--", label="limit")
        memory.set_ylabel("memory of the container (MiB)")
        times.set_ylabel("time to first token (s)")
        times.set_xlabel("seconds")
        for axes in (memory, times):
            if axes.get_legend_handles_labels()[0]:
                axes.legend()

    return saved(folder / "server.png", draw, size_in=(9, 7), grid=(2, 1))
