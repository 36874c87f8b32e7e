"""What the trials without swap come to: kills by rate, and the table of the field."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import msgspec

from psi_kv_governor.bench.messages import Variant
from psi_kv_governor.bench.record import Asked, Figure, figure
from psi_kv_governor.bench.sampling import percentile
from psi_kv_governor.bench.script import MIB
from psi_kv_governor.bench.trials.keep import Table
from psi_kv_governor.bench.trials.oom_plan import NAMES, VARIANTS, Trial, rate_words, sorted_rates
from psi_kv_governor.bench.trials.sizing import Need, Sizes
from psi_kv_governor.bench.trials.stats import speed_of, starts_to_die, survives_up_to, wilson

ASKED_UP_TO = 200.0
"""MB/s: what a browser or a build takes memory at. Up to it no governed run may end in a kill."""
NO_KILL = Asked("<=", 0, "max")
NEARLY_ALL = Asked(">=", 0.9)


class Scene(msgspec.Struct, frozen=True, kw_only=True):
    """What the runs were done in."""

    need: Need
    sizes: Sizes
    kill_excess_bytes: int
    """By which the whole cache and the load pass the limit, without a page of the weights."""
    trimmed_room_bytes: int
    """From the trimmed cache, the weights and the load to the low line."""


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """All runs of one variant at one rate; None where nothing was measured."""

    variant: Variant
    rate: float
    runs: int
    killed: int
    """Runs in which the model or the neighbour was killed."""
    model_killed: int
    neighbour_killed: int
    stuck: int
    low: float
    """Wilson's interval of the share of runs with a kill, 95 %."""
    high: float
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


def cell(variant: Variant, rate: float, trials: Sequence[Trial]) -> Cell:
    """Sum up trials of one variant and one rate."""
    killed = sum(died(trial) for trial in trials)
    low, high = wilson(killed, len(trials))
    token_s = [seconds for trial in trials for seconds in trial.token_s]
    return Cell(
        variant=variant,
        rate=rate,
        runs=len(trials),
        killed=killed,
        model_killed=sum(trial.model_killed for trial in trials),
        neighbour_killed=sum(trial.neighbour_killed for trial in trials),
        stuck=sum(trial.stuck for trial in trials),
        low=low,
        high=high,
        peak_bytes=[trial.peak_bytes for trial in trials],
        held_bytes=[trial.held_bytes for trial in trials if trial.held_bytes is not None],
        p50_s=percentile(token_s, 0.5) if token_s else None,
        p99_s=percentile(token_s, 0.99) if token_s else None,
        returned_bytes=[trial.returned_bytes for trial in trials],
        first_returned_s=[trial.first_returned_s for trial in trials if trial.first_returned_s is not None],
        whole=sum(trial.whole is True for trial in trials),
        survived=sum(not trial.model_killed for trial in trials),
    )


def died(trial: Trial) -> bool:
    """Whether the kernel killed one of the two: the neighbour's death is as much a failure as the model's."""
    return trial.model_killed or trial.neighbour_killed


def cells(trials: Sequence[Trial]) -> list[Cell]:
    """A cell for each variant and rate that was run."""
    return [
        cell(variant, rate, found)
        for variant in VARIANTS
        for rate in sorted_rates([trial.rate for trial in trials])
        if (found := [trial for trial in trials if (trial.variant, trial.rate) == (variant, rate)])
    ]


def by_rate(found: Sequence[Cell], variant: Variant) -> dict[float, tuple[int, int]]:
    """(runs with a kill, runs) of a variant by rate."""
    return {one.rate: (one.killed, one.runs) for one in found if one.variant == variant}


def tables(trials: Sequence[Trial]) -> list[Table]:
    """By rate; where each begins to die; the field's table."""
    found = cells(trials)
    return [_rates_table(found), _limits_table(found), _field_table(trials)]


def _rates_table(found: Sequence[Cell]) -> Table:
    columns = ["variant", "ramp", "runs", "killed", "95 %", "model", "neighbour", "stuck", "peak MiB", "held"]
    columns += ["p50 ms", "p99 ms", "returned MiB", "first back s", "whole"]
    rows = [
        [
            NAMES[one.variant],
            rate_words(one.rate),
            str(one.runs),
            f"{one.killed / one.runs:.0%}",
            f"{one.low:.0%} to {one.high:.0%}",
            str(one.model_killed),
            str(one.neighbour_killed),
            str(one.stuck),
            spread(one.peak_bytes, 1 / MIB),
            spread(one.held_bytes, 1 / MIB),
            _ms(one.p50_s),
            _ms(one.p99_s),
            spread(one.returned_bytes, 1 / MIB),
            spread(one.first_returned_s, 1.0, "{:.2f}"),
            f"{one.whole} of {one.survived}",
        ]
        for one in found
    ]
    return Table(title="Kills by ramp, without swap", columns=columns, rows=rows)


def _limits_table(found: Sequence[Cell]) -> Table:
    rows = []
    for variant in VARIANTS:
        killed = by_rate(found, variant)
        if killed:
            rows.append(
                [NAMES[variant], rate_words(survives_up_to(killed)), rate_words(starts_to_die(killed))]
            )
    return Table(title="Where it begins", columns=["variant", "no kill up to", "first kill at"], rows=rows)


def _field_table(trials: Sequence[Trial]) -> Table:
    rows = []
    for variant in VARIANTS:
        mine = [trial for trial in trials if trial.variant == variant]
        if not mine:
            continue
        killed = sum(map(died, mine))
        low, high = wilson(killed, len(mine))
        token_s = [seconds for trial in mine for seconds in trial.token_s]
        rows.append(
            [
                {"fixed": "static", "psi": "governed"}[variant],
                str(len(mine)),
                spread([trial.peak_bytes for trial in mine], 1 / MIB),
                f"{1000 * killed / len(mine):.0f} ({1000 * low:.0f} to {1000 * high:.0f})",
                _ms(percentile(token_s, 0.5) if token_s else None),
                _ms(percentile(token_s, 0.99) if token_s else None),
            ]
        )
    columns = ["cache", "runs", "peak memory MiB", "kills per 1,000 runs", "p50 ms", "p99 ms"]
    return Table(title="Static against governed", columns=columns, rows=rows)


def figures(trials: Sequence[Trial]) -> Iterator[Figure]:
    """What is held against what was asked."""
    found = cells(trials)
    slow = [one for one in found if speed_of(one.rate) <= ASKED_UP_TO]
    governed = [one for one in slow if one.variant == "psi"]
    if governed:
        case = f"governed, {sum(one.runs for one in governed)} runs, ramps up to {ASKED_UP_TO:g} MB/s"
        yield figure("runs with a kill", "runs", [sum(one.killed for one in governed)], NO_KILL, case=case)
    fixed = [one for one in found if one.variant == "fixed"]
    if fixed:
        runs, killed = sum(one.runs for one in fixed), sum(one.killed for one in fixed)
        case = f"fixed, {runs} runs"
        yield figure("runs with a kill", "share", [killed / runs], NEARLY_ALL, case=case)
    survived = [trial for trial in trials if trial.variant == "psi" and trial.whole is not None]
    if survived:
        whole = sum(trial.whole is True for trial in survived) / len(survived)
        case = "governed, of the runs that the model survived"
        yield figure("context back bit for bit", "share", [whole], case=case)


def notes(trials: Sequence[Trial], scene: Scene | None = None) -> list[str]:
    """How to read it, and what the last turns of the governor were before each kill."""
    told = _scene_words(scene) if scene else []
    told += [
        "killed: the kernel killed the model or the neighbour; stuck: neither died, and it went no further",
        "peak and held: resident of the model's process, at most and at the end of the hold; it begins full",
        "returned, first back, p50 and p99 count from the neighbour's first byte; spread: min to max",
    ]
    for trial in trials:
        if trial.variant == "psi" and died(trial) and trial.trail:
            last = trial.trail[-1]
            who = " and ".join(
                name
                for name, dead in (("model", trial.model_killed), ("neighbour", trial.neighbour_killed))
                if dead
            )
            told.append(
                f"run {trial.number} ({rate_words(trial.rate)}) killed the {who} after "
                f"{trial.seconds:.2f} s; the governor's last turn: {last.action}, {last.live_cells} live: "
                f"{last.reason}"
            )
    return told


def _scene_words(scene: Scene) -> list[str]:
    return [
        f"the pen has {scene.sizes.limit_bytes // MIB} MiB and the load {scene.sizes.load_bytes // MIB}: "
        "without one page of the weights the whole cache and the load "
        f"{_over(scene.kill_excess_bytes, 'the limit')}; a cache at its floor, the weights and the load "
        f"{_over(-scene.trimmed_room_bytes, 'the low line')}",
    ]


def _over(n_bytes: int, what: str) -> str:
    how = "are" if n_bytes > 0 else "stay"
    side = "over" if n_bytes > 0 else "under"
    return f"{how} {abs(n_bytes) / MIB:.0f} MiB {side} {what}"


def records(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """A flat line for each trial."""
    left_out = {"sizes", "token_s", "trail"}
    lines = []
    for trial in trials:
        line = {key: value for key, value in msgspec.structs.asdict(trial).items() if key not in left_out}
        line["tokens"] = len(trial.token_s)
        line["p50_s"] = percentile(trial.token_s, 0.5) if trial.token_s else ""
        line["p99_s"] = percentile(trial.token_s, 0.99) if trial.token_s else ""
        lines.append(line)
    return lines


def spread(values: Sequence[float], scale: float, form: str = "{:.0f}") -> str:
    """The median, and min to max where there are several values."""
    if not values:
        return "-"
    middle = form.format(median(values) * scale)
    if len(values) == 1:
        return middle
    return f"{middle} ({form.format(min(values) * scale)} to {form.format(max(values) * scale)})"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.0f}"
