"""A trial of the oom scene, and what all of them come to: kills by variant and ramp."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from psi_kv_governor.quantile import quantile
from psi_kv_governor.sandbox.load import MIB
from psikv_bench import plots
from psikv_bench.figures import Asked, Figure, figure, ms, spread
from psikv_bench.intervals import Share, share_of
from psikv_bench.messages import Turned, Variant, is_governed
from psikv_bench.options import in_order
from psikv_bench.record import Table
from psikv_bench.trials.sizing import Sizes

ASKED_UP_TO = 200.0
"""MB/s: what a browser or a build takes memory at. Up to it no governed run may end in a kill."""
NO_KILL = Asked("<=", 0, "max")
NEARLY_ALL = Asked(">=", 0.9)


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One run: a neighbour took memory beside a model that was decoding. None: it never was."""

    number: int
    variant: Variant
    rate: float
    sizes: Sizes
    model_killed: bool
    neighbour_killed: bool
    stuck: bool
    """Neither was killed, and it went no further: not counted as a kill, and said apart."""
    seconds: float
    """From the neighbour's first byte to the end of the hold, or of one of them."""
    token_s: list[float]
    """Of each token since the neighbour's first byte."""
    peak_bytes: int
    """Most that was resident of the model's process."""
    held_bytes: int | None
    """What was resident of it at the end of the hold; None where it was killed."""
    returned_bytes: int
    trims: int
    first_returned_s: float | None
    """From the neighbour's first byte to the governor's first bytes back."""
    whole: bool | None
    """Whether every cell came back afterwards, the logits the same bits; None where the model was killed."""
    not_whole: str = ""
    """Why not: cells were away still, or differ."""
    trail: list[Turned]
    """The governor's last turns before a kill: what it saw and decided."""

    @property
    def died(self) -> bool:
        """Whether the kernel killed one of the two: the neighbour's death is as much a failure."""
        return self.model_killed or self.neighbour_killed


def speed_of(rate: float) -> float:
    """A rate as a number to sort by: 0 stands for as fast as it can."""
    return math.inf if rate == 0 else rate


def rate_words(rate: float) -> str:
    """A rate as it is read."""
    return "as fast as it can" if rate == 0 else f"{rate:g} MB/s"


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """All runs of one variant at one rate, or at all of them (None); None where nothing was measured."""

    variant: Variant
    rate: float | None
    killed: Share
    """Runs in which the model or the neighbour was killed."""
    model_killed: int
    neighbour_killed: int
    stuck: int
    peak_bytes: list[float]
    """Of the model's process in each run."""
    held_bytes: list[float]
    """Resident of it at the end of the hold, of those that lived."""
    p50_s: float | None
    """Of all tokens of all runs, since the neighbour's first byte."""
    p99_s: float | None
    returned_bytes: list[float]
    first_returned_s: list[float]
    whole: int
    survived: int
    """Runs whose model was not killed; `whole` of them had every bit of their context back."""


def cell(variant: Variant, rate: float | None, trials: Sequence[Trial]) -> Cell:
    """Sum up trials of one variant."""
    token_s = [seconds for trial in trials for seconds in trial.token_s]
    return Cell(
        variant=variant,
        rate=rate,
        killed=share_of(sum(trial.died for trial in trials), len(trials)),
        model_killed=sum(trial.model_killed for trial in trials),
        neighbour_killed=sum(trial.neighbour_killed for trial in trials),
        stuck=sum(trial.stuck for trial in trials),
        peak_bytes=[trial.peak_bytes for trial in trials],
        held_bytes=[trial.held_bytes for trial in trials if trial.held_bytes is not None],
        p50_s=quantile(token_s, 0.5) if token_s else None,
        p99_s=quantile(token_s, 0.99) if token_s else None,
        returned_bytes=[trial.returned_bytes for trial in trials],
        first_returned_s=[trial.first_returned_s for trial in trials if trial.first_returned_s is not None],
        whole=sum(trial.whole is True for trial in trials),
        survived=sum(not trial.model_killed for trial in trials),
    )


def by_variant(trials: Sequence[Trial]) -> dict[Variant, list[Trial]]:
    """The trials of each, in their order."""
    variants = in_order(list({trial.variant for trial in trials}))
    return {variant: [trial for trial in trials if trial.variant == variant] for variant in variants}


def cells(trials: Sequence[Trial]) -> list[Cell]:
    """A cell for each variant and rate that was run."""
    return [
        cell(variant, rate, [trial for trial in mine if trial.rate == rate])
        for variant, mine in by_variant(trials).items()
        for rate in sorted({trial.rate for trial in mine}, key=speed_of)
    ]


_BY_RAMP: dict[str, Callable[[Cell], object]] = {
    "variant": lambda one: one.variant,
    "ramp": lambda one: rate_words(one.rate or 0.0),
    "runs": lambda one: one.killed.trials,
    "killed": lambda one: f"{one.killed.mean:.0%}",
    "95 %": lambda one: f"{one.killed.low:.0%} to {one.killed.high:.0%}",
    "model": lambda one: one.model_killed,
    "neighbour": lambda one: one.neighbour_killed,
    "stuck": lambda one: one.stuck,
    "peak MiB": lambda one: spread(one.peak_bytes, 1 / MIB),
    "held": lambda one: spread(one.held_bytes, 1 / MIB),
    "p50 ms": lambda one: ms(one.p50_s),
    "p99 ms": lambda one: ms(one.p99_s),
    "returned MiB": lambda one: spread(one.returned_bytes, 1 / MIB),
    "first back s": lambda one: spread(one.first_returned_s, 1.0, "{:.2f}"),
    "whole": lambda one: f"{one.whole} of {one.survived}",
}
_ALL_RAMPS: dict[str, Callable[[Cell], object]] = {
    "variant": lambda one: one.variant,
    "runs": lambda one: one.killed.trials,
    "peak memory MiB": lambda one: spread(one.peak_bytes, 1 / MIB),
    "kills per 1,000 runs": lambda one: (
        f"{1e3 * one.killed.mean:.0f} ({1e3 * one.killed.low:.0f} to {1e3 * one.killed.high:.0f})"
    ),
    "p50 ms": lambda one: ms(one.p50_s),
    "p99 ms": lambda one: ms(one.p99_s),
}


def tables(trials: Sequence[Trial]) -> list[Table]:
    """By rate, and all rates together."""
    together = [cell(variant, None, mine) for variant, mine in by_variant(trials).items()]
    return [
        Table.of("Kills by ramp", _BY_RAMP, cells(trials)),
        Table.of("All ramps", _ALL_RAMPS, together),
    ]


def figures(trials: Sequence[Trial], *, without_swap: bool = True) -> Iterator[Figure]:
    """What is held against what was asked."""
    for variant, mine in by_variant(trials).items():
        if not is_governed(variant):
            asked = NEARLY_ALL if variant == "fixed" and without_swap else None
            share = sum(one.died for one in mine) / len(mine)
            yield figure("runs with a kill", "share", [share], asked, case=f"{variant}, {len(mine)} runs")
            continue
        if slow := [trial for trial in mine if speed_of(trial.rate) <= ASKED_UP_TO]:
            case = f"{variant}, {len(slow)} runs, ramps up to {ASKED_UP_TO:g} MB/s"
            yield figure("runs with a kill", "runs", [sum(one.died for one in slow)], NO_KILL, case=case)
        if survived := [trial.whole for trial in mine if trial.whole is not None]:
            case = f"{variant}, of the runs that the model survived"
            yield figure("context back bit for bit", "share", [sum(survived) / len(survived)], case=case)


def notes(trials: Sequence[Trial]) -> Iterator[str]:
    """How to read it, and what the last turns of the governor were before each kill."""
    yield "killed: the kernel killed the model or the neighbour; stuck: neither died, and it went no further"
    yield "peak and held: resident of the model's process, at most and at the end of the hold; it begins full"
    yield "returned, first back, p50 and p99 count from the neighbour's first byte; spread: min to max"
    for trial in trials:
        if trial.died and trial.trail:
            last = trial.trail[-1]
            dead = [name for name in ("model", "neighbour") if getattr(trial, f"{name}_killed")]
            yield (
                f"run {trial.number} ({trial.variant}, {rate_words(trial.rate)}) killed the "
                f"{' and '.join(dead)} after {trial.seconds:.2f} s; the governor's last turn: {last.action}, "
                f"{last.live_bytes >> 20} MiB live: {last.reason}"
            )


def plot(folder: Path, trials: Sequence[Trial]) -> str:
    """Share of runs with a kill by ramp, with its interval of 95 %."""
    rates = sorted({trial.rate for trial in trials}, key=speed_of)
    variants = by_variant(trials)

    def draw(figure: Any, grid: Any) -> None:
        axes = grid[0, 0]
        for number, (variant, mine) in enumerate(variants.items()):
            found = {one.rate: one.killed for one in cells(mine)}
            offset = 0.24 * (number - (len(variants) - 1) / 2)
            plots.errors(
                axes, [rates.index(rate) + offset for rate in found if rate is not None],
                list(found.values()), 100.0, fmt="o", color=plots.COLOURS[variant], capsize=3,
                label=f"{variant}, {len(mine)} runs",
            )  # fmt: skip
        axes.set_xticks(range(len(rates)), [f"{rate:g}" if rate else "as fast\nas it can" for rate in rates])
        axes.set_xlabel("ramp of the neighbour, MB/s")
        axes.set_ylabel("runs with a kill, %")
        axes.set_ylim(-4, 104)
        plots.legend_above(figure)

    return plots.saved(folder / "kills.png", draw, size_in=(6.5, 3.6))
