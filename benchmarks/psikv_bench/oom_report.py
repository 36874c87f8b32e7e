"""What the trials of the oom scene come to: kills by variant and ramp."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.quantile import quantile
from psi_kv_governor.sandbox.host import MIB
from psi_kv_governor.sandbox.llm import is_governed
from psi_kv_governor.sandbox.messages import Variant
from psikv_bench import plots
from psikv_bench.figures import Asked, Figure, figure, ms, spread
from psikv_bench.intervals import Share, share_of
from psikv_bench.oom_trial import Trial, rate_words, sorted_rates, speed_of, starts_to_die, survives_up_to
from psikv_bench.options import in_order
from psikv_bench.record import Recorder, Report, Table
from psikv_bench.trials.sizing import Need, Sizes, kill_excess, trimmed_bytes

ASKED_UP_TO = 200.0
"""MB/s: what a browser or a build takes memory at. Up to it no governed run may end in a kill."""
NO_KILL = Asked("<=", 0, "max")
NEARLY_ALL = Asked(">=", 0.9)


class InScene(msgspec.Struct, frozen=True, kw_only=True):
    """What the runs were done in."""

    need: Need
    sizes: Sizes
    kill_excess_bytes: int
    """By which the whole cache and the load pass the limit, without a page of the weights."""
    trimmed_bytes: int
    """From the trimmed cache, the weights and the load to the low line."""

    @classmethod
    def of(cls, need: Need, sizes: Sizes, config: GovernorConfig) -> InScene:
        """From what the model takes."""
        return cls(
            need=need,
            sizes=sizes,
            kill_excess_bytes=kill_excess(need, sizes),
            trimmed_bytes=trimmed_bytes(need, config, sizes),
        )


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """All runs of one variant at one rate, or at all of them; None where nothing was measured."""

    variant: Variant
    rate: float | None
    """None: all of them."""
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


def cells(trials: Sequence[Trial]) -> list[Cell]:
    """A cell for each variant and rate that was run."""
    return [
        cell(variant, rate, found)
        for variant in _variants(trials)
        for rate in sorted_rates([trial.rate for trial in trials])
        if (found := [trial for trial in trials if (trial.variant, trial.rate) == (variant, rate)])
    ]


def _variants(trials: Sequence[Trial]) -> list[Variant]:
    return in_order(list({trial.variant for trial in trials}))


# -- the report --------------------------------------------------------------------------------------------


def report_of(
    recorder: Recorder[Any], trials: Sequence[Trial], scene: InScene | None, *, interrupted: bool
) -> Report:
    """All of it. `scene` is None where nothing was run any more."""
    return recorder.report(
        list(figures(trials, without_swap=recorder.options.swap == "none")),
        [recorder.options.threads or 1],
        options={"scene": scene},
        interrupted=interrupted,
        tables=tables(trials),
        notes=notes(trials, scene),
        rows=msgspec.to_builtins(cells(trials)),
    )


def tables(trials: Sequence[Trial]) -> list[Table]:
    """By rate; where each begins to die; all rates together."""
    found = cells(trials)
    limits, together = [], []
    for variant in _variants(trials):
        killed = {one.rate: one.killed for one in found if one.variant == variant and one.rate is not None}
        limits.append([variant, rate_words(survives_up_to(killed)), rate_words(starts_to_die(killed))])
        one = cell(variant, None, [trial for trial in trials if trial.variant == variant])
        share = one.killed
        killed_words = f"{1e3 * share.mean:.0f} ({1e3 * share.low:.0f} to {1e3 * share.high:.0f})"
        together.append(
            [
                variant,
                str(share.trials),
                spread(one.peak_bytes, 1 / MIB),
                killed_words,
                ms(one.p50_s),
                ms(one.p99_s),
            ]
        )
    columns = ["variant", "ramp", "runs", "killed", "95 %", "model", "neighbour", "stuck", "peak MiB", "held"]
    columns += ["p50 ms", "p99 ms", "returned MiB", "first back s", "whole"]
    return [
        Table(title="Kills by ramp", columns=columns, rows=[_row(one) for one in found]),
        Table(title="Where it begins", columns=["variant", "no kill up to", "first kill at"], rows=limits),
        Table(
            title="All ramps",
            columns=["variant", "runs", "peak memory MiB", "kills per 1,000 runs", "p50 ms", "p99 ms"],
            rows=together,
        ),
    ]


def _row(one: Cell) -> list[str]:
    return [
        one.variant,
        rate_words(one.rate),
        str(one.killed.trials),
        f"{one.killed.mean:.0%}",
        f"{one.killed.low:.0%} to {one.killed.high:.0%}",
        str(one.model_killed),
        str(one.neighbour_killed),
        str(one.stuck),
        spread(one.peak_bytes, 1 / MIB),
        spread(one.held_bytes, 1 / MIB),
        ms(one.p50_s),
        ms(one.p99_s),
        spread(one.returned_bytes, 1 / MIB),
        spread(one.first_returned_s, 1.0, "{:.2f}"),
        f"{one.whole} of {one.survived}",
    ]


def figures(trials: Sequence[Trial], *, without_swap: bool = True) -> Iterator[Figure]:
    """What is held against what was asked."""
    for variant in _variants(trials):
        mine = [trial for trial in trials if trial.variant == variant]
        if is_governed(variant):
            slow = [trial for trial in mine if speed_of(trial.rate) <= ASKED_UP_TO]
            if slow:
                case = f"{variant}, {len(slow)} runs, ramps up to {ASKED_UP_TO:g} MB/s"
                yield figure("runs with a kill", "runs", [sum(one.died for one in slow)], NO_KILL, case=case)
        else:
            asked = NEARLY_ALL if variant == "fixed" and without_swap else None
            share = sum(one.died for one in mine) / len(mine)
            yield figure("runs with a kill", "share", [share], asked, case=f"{variant}, {len(mine)} runs")
        survived = [trial.whole for trial in mine if trial.whole is not None]
        if survived and is_governed(variant):
            case = f"{variant}, of the runs that the model survived"
            yield figure("context back bit for bit", "share", [sum(survived) / len(survived)], case=case)


def notes(trials: Sequence[Trial], scene: InScene | None = None) -> list[str]:
    """How to read it, and what the last turns of the governor were before each kill."""
    lines = _scene_words(scene) if scene else []
    lines += [
        "killed: the kernel killed the model or the neighbour; stuck: neither died, and it went no further",
        "peak and held: resident of the model's process, at most and at the end of the hold; it begins full",
        "returned, first back, p50 and p99 count from the neighbour's first byte; spread: min to max",
    ]
    for trial in trials:
        if trial.died and trial.trail:
            last = trial.trail[-1]
            dead = [name for name in ("model", "neighbour") if getattr(trial, f"{name}_killed")]
            lines.append(
                f"run {trial.number} ({trial.variant}, {rate_words(trial.rate)}) killed the "
                f"{' and '.join(dead)} after {trial.seconds:.2f} s; the governor's last turn: {last.action}, "
                f"{last.live_bytes >> 20} MiB live: {last.reason}"
            )
    return lines


def _scene_words(scene: InScene) -> list[str]:
    return [
        f"the cgroup has {scene.sizes.limit_bytes // MIB} MiB and the load {scene.sizes.load_bytes // MIB}: "
        "without one page of the weights the whole cache and the load "
        f"{_over(scene.kill_excess_bytes, 'the limit')}; a cache at its floor, the weights and the load "
        f"{_over(-scene.trimmed_bytes, 'the low line')}",
    ]


def _over(n_bytes: int, what: str) -> str:
    how = "are" if n_bytes > 0 else "stay"
    side = "over" if n_bytes > 0 else "under"
    return f"{how} {abs(n_bytes) / MIB:.0f} MiB {side} {what}"


def records(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """A flat line for each trial."""
    lines = []
    for trial in trials:
        line = msgspec.structs.asdict(trial)
        token_s = trial.token_s
        for name in ("sizes", "token_s", "trail"):
            del line[name]
        line["tokens"] = len(token_s)
        for share in (50, 99):
            line[f"p{share}_s"] = quantile(token_s, share / 100) if token_s else ""
        lines.append(line)
    return lines


def plot(folder: Path, trials: Sequence[Trial]) -> str:
    """Share of runs with a kill by ramp, with its interval of 95 %."""
    found = cells(trials)
    rates = sorted_rates([trial.rate for trial in trials])

    def draw(figure: Any, grid: Any) -> None:
        axes = grid[0, 0]
        variants = _variants(trials)
        for number, variant in enumerate(variants):
            mine = [one for one in found if one.variant == variant and one.rate is not None]
            offset = 0.24 * (number - (len(variants) - 1) / 2)
            places = [rates.index(one.rate) + offset for one in mine if one.rate is not None]
            runs = sum(one.killed.trials for one in mine)
            plots.errors(
                axes, places, [one.killed for one in mine], 100.0, fmt="o", color=plots.COLOURS[variant],
                capsize=3, label=f"{variant}, {runs} runs",
            )  # fmt: skip
        axes.set_xticks(range(len(rates)), [f"{rate:g}" if rate else "as fast\nas it can" for rate in rates])
        axes.set_xlabel("ramp of the neighbour, MB/s")
        axes.set_ylabel("runs with a kill, %")
        axes.set_ylim(-4, 104)
        plots.legend_above(figure)

    return plots.saved(folder / "kills.png", draw, size_in=(6.5, 3.6))
