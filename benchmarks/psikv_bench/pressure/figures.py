"""What the runs say: medians with their spread, ratios within each repeat, and what was asked of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from psikv_bench.figures import Asked, Figure, figure, shown
from psikv_bench.messages import Variant, is_governed
from psikv_bench.options import in_order
from psikv_bench.pressure.options import PressureOptions
from psikv_bench.pressure.result import SceneResult
from psikv_bench.pressure.setting import Setting
from psikv_bench.record import Table
from psikv_bench.watch import Shares, amount_at

MB = 1_000_000

RATIOS = "ratios"
"""Case of the figures that compare two runs of one repeat."""

SPEED, P99, WORK, PEAK = "tokens/s", "p99 of a token", "neighbour's work", "peak resident"

_OVER_FIXED = {
    SPEED: Asked(">=", 2.5),
    P99: Asked("<=", 0.5),
    WORK: Asked(">=", 1.0),
    PEAK: Asked("<=", 0.5),
}
_OVER_REFERENCE = {SPEED: Asked(">=", 2.5), P99: Asked("<=", 0.5)}
_CALM_OVER_FIXED = {SPEED: Asked(">=", 0.99)}
_NOTHING_RETURNED = Asked("<=", 1.0, "max")
"""MB that the reference may return and still have returned nothing."""
_NONE = Asked("<=", 0.0, "max")


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One variant in one repeat."""

    number: int
    """From 1, in the order in which they were played."""
    repeat: int
    """From 1."""
    result: SceneResult

    @property
    def variant(self) -> Variant:
        """Which of them it is."""
        return self.result.variant


def whole_repeats(runs: Sequence[Run], variants: Sequence[Variant]) -> list[dict[Variant, SceneResult]]:
    """The repeats in which every variant was played, by variant."""
    by_repeat: dict[int, dict[Variant, SceneResult]] = {}
    for run in runs:
        by_repeat.setdefault(run.repeat, {})[run.variant] = run.result
    return [found for _, found in sorted(by_repeat.items()) if set(found) == set(variants)]


def figures(
    runs: Sequence[Run], variants: Sequence[Variant], *, calm: bool, judged: bool
) -> Iterator[Figure]:
    """All figures. `calm`: there was no neighbour; `judged`: what is asked was asked of this setting."""
    repeats = whole_repeats(runs, variants)
    for one, other, asked in _compared(in_order(variants), calm=calm):
        yield from _ratios(repeats, one, other, asked if judged else {})
    for variant in in_order(variants):
        found = [run.result for run in runs if run.variant == variant]
        yield from _of_variant(variant, found, judged=judged and not calm)


def _compared(
    variants: Sequence[Variant], *, calm: bool
) -> Iterator[tuple[Variant, Variant, dict[str, Asked]]]:
    """Which are compared, and what is asked of their ratios."""
    for one in variants:
        if one != "fixed" and "fixed" in variants:
            asked = _CALM_OVER_FIXED if calm else _OVER_FIXED
            yield one, "fixed", asked if is_governed(one) else {}
        if is_governed(one) and "reference" in variants:
            yield one, "reference", {} if calm else _OVER_REFERENCE


def _ratios(
    repeats: Sequence[dict[Variant, SceneResult]], one: Variant, other: Variant, asked: dict[str, Asked]
) -> Iterator[Figure]:
    for name, measure in _MEASURES.items():
        pairs = [(repeat[one], repeat[other]) for repeat in repeats]
        both = [(measure(ours, theirs), measure(theirs, ours)) for ours, theirs in pairs]
        if values := [mine / its for mine, its in both if mine is not None and its]:
            yield figure(f"{one} / {other}, {name}", "x", values, asked.get(name), case=RATIOS)


def speed(found: SceneResult) -> float:
    """Tokens a second. Where not one was decoded, less than one was: a ratio to it is at least this."""
    return found.tokens_per_s or 1 / found.seconds


def or_all(found: SceneResult, seconds: float | None) -> float:
    """Where not one token was decoded, the first took longer than all of the time."""
    return found.seconds if seconds is None else seconds


def work_beside(found: SceneResult, other: SceneResult) -> float | None:
    """Bytes that the neighbour got done while both runs were still decoding; None where there was none.

    A run that is over sooner has less time left after the neighbour took its memory, which is slow work:
    over their own times, the faster run would have the slower neighbour.
    """
    if not found.neighbour_work:
        return None
    begin_s = found.decoding_from_s
    end_s = begin_s + min(found.seconds, other.seconds)
    return amount_at(found.neighbour_work, end_s) - amount_at(found.neighbour_work, begin_s)


_MEASURES: dict[str, Callable[[SceneResult, SceneResult], float | None]] = {
    SPEED: lambda found, _: speed(found),
    P99: lambda found, _: or_all(found, found.p99_s),
    WORK: work_beside,
    PEAK: lambda found, _: found.peak_resident_bytes,
    "speed in peace": lambda found, _: found.calm_tokens_per_s,
}

Measure = Callable[[SceneResult], float | None]
COLUMNS: tuple[tuple[str, str, Measure], ...] = (
    ("decoded", "tokens", lambda run: run.tokens),
    (SPEED, "tokens/s", lambda run: run.tokens_per_s),
    ("speed in peace", "tokens/s", lambda run: run.calm_tokens_per_s),
    ("prunes", "times", lambda run: run.trims),
    ("first prune after", "s", lambda run: run.first_trim_s),
    ("final KV", "cells", lambda run: run.final_cells),
    ("PSI outside, some", "share", lambda run: run.outside.some if run.outside else None),
    ("PSI outside, full", "share", lambda run: run.outside.full if run.outside else None),
    ("PSI inside, some", "share", lambda run: run.stall),
    ("PSI inside, full", "share", lambda run: run.stall_full),
    ("returned", "MB", lambda run: run.bytes_returned / MB),
    (PEAK, "MB", lambda run: run.peak_resident_bytes / MB),
    ("least resident", "MB", lambda run: run.least_resident_bytes / MB),
    ("most in swap", "MB", lambda run: run.most_swapped_bytes / MB),
    ("p50 of a token", "ms", lambda run: 1e3 * or_all(run, run.p50_s)),
    (P99, "ms", lambda run: 1e3 * or_all(run, run.p99_s)),
    ("longest token", "ms", lambda run: 1e3 * or_all(run, run.max_s)),
    (WORK, "GB/s", lambda run: (run.neighbour_bytes_per_s or 0.0) / 1e9),
    ("killed", "runs", lambda run: float(run.killed)),
    ("neighbour killed", "runs", lambda run: float(run.neighbour_killed)),
    ("missing at the end", "cells", lambda run: run.missing_cells),
)
"""Name, unit and value of what is summed up over the repeats."""


def _of_variant(variant: Variant, found: Sequence[SceneResult], *, judged: bool) -> Iterator[Figure]:
    asked = {}
    if judged and is_governed(variant):
        asked = {"killed": _NONE, "missing at the end": _NONE}
    elif judged and variant == "reference":
        asked = {"returned": _NOTHING_RETURNED}
    for name, unit, measure in COLUMNS:
        if values := [value for value in map(measure, found) if value is not None]:
            yield figure(name, unit, values, asked.get(name), case=variant)


# -- tables ------------------------------------------------------------------------------------------------


_BY_RUN: dict[str, Callable[[Run], object]] = {
    "run": lambda run: run.number,
    "variant": lambda run: run.variant,
    "decoded": lambda run: run.result.tokens,
    "tok/s": lambda run: f"{run.result.tokens_per_s:.1f}",
    "prunes": lambda run: run.result.trims,
    "final KV": lambda run: f"{run.result.final_cells:,}",
    "external PSI some/full": lambda run: _shares(run.result.outside),
    "inside PSI some/full": lambda run: (
        "-" if run.result.stall is None else _shares(Shares(run.result.stall, run.result.stall_full or 0.0))
    ),
    "returned": lambda run: f"{run.result.bytes_returned / MB:.1f} MB",
    "peak resident": lambda run: f"{run.result.peak_resident_bytes / MB:.0f} MB",
    "neighbour": lambda run: _neighbour(run.result.neighbour_bytes_per_s),
    "killed": lambda run: (
        "yes" if run.result.killed else "neighbour" if run.result.neighbour_killed else "no"
    ),
    "restored": lambda run: _restored(run.result),
}
"""External: of the whole machine, /proc/pressure/memory. Inside: of the run's own cgroup."""


def tables(runs: Sequence[Run], figures: Sequence[Figure]) -> list[Table]:
    """The runs, their medians, and the ratios."""
    ratios = [found for found in figures if found.case == RATIOS]
    known = {(found.case, found.name): _spread(found) for found in figures}
    cases = list(dict.fromkeys(found.case for found in figures if found.case != RATIOS))
    medians = [
        [
            f"{name}, {unit}" if unit not in {"share", "times", name} else name,
            *(known.get((case, name), "-") for case in cases),
        ]
        for name, unit, _ in COLUMNS
    ]
    columns: dict[str, Callable[[Figure], str]] = {
        "ratios within a repeat": lambda found: found.name,
        "median (min to max)": _spread,
    }
    return [
        Table.of("Runs", _BY_RUN, runs),
        Table(title="Medians", columns=["median (min to max)", *cases], rows=medians),
        *([Table.of("Ratios within a repeat", columns, ratios)] if ratios else ()),
    ]


def _spread(found: Figure) -> str:
    median, least, most = (shown(value, found.unit) for value in (found.median, found.min, found.max))
    return f"{median} ({least} to {most})"


def _shares(found: Shares | None) -> str:
    return "-" if found is None else f"{found.some:.0%}/{found.full:.0%}"


def _neighbour(bytes_per_s: float | None) -> str:
    return "-" if bytes_per_s is None else f"{bytes_per_s / 1e9:.1f} GB/s"


def _restored(found: SceneResult) -> str:
    if found.restored is None:
        return "-"
    if found.killed:
        return "killed"
    return "all" if found.restored else f"{found.missing_cells:,} gone"


def circumstances(options: PressureOptions, setting: Setting, model: str) -> Iterator[str]:
    """What was played, a line each."""
    yield scene_words(options, setting, model)
    yield (
        "all variants: flash attention on, the same threads, batch and prompt, greedy; plain llama_cpp.Llama "
        "for fixed and reference, GovernedLlama for the others"
    )
    yield f"reference: {setting.reference}"
    yield (
        "neighbour's work: bytes filled, touched (a byte a page counts as the page) or read while tokens "
        "were decoded; in ratios, while both runs were still decoding"
    )


def scene_words(options: PressureOptions, setting: Setting, model: str) -> str:
    """What was played, in a line."""
    where = "no cgroup"
    if setting.limit_bytes is not None:
        where = f"a memory cgroup of {setting.limit_bytes / MB:.0f} MB, swap: {setting.swap}"
    load = f"a neighbour ({options.load}) of {setting.pressure_bytes / MB:.0f} MB"
    threads = options.threads or 1
    return (
        f"{model}, {options.ctx_size:,} cells, {setting.prompt_tokens:,} tokens of prompt, "
        f"{options.n_predict} decoded on {threads} thread{'s' if threads > 1 else ''}; {where}; "
        f"{load if setting.pressure_bytes else 'no neighbour'}"
    )


def rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The runs as numbers, without what stands in the samples and in the journal."""
    found: list[dict[str, Any]] = msgspec.to_builtins(list(runs))
    for run in found:
        for name in ("moments", "token_s", "neighbour_work"):
            del run["result"][name]
    return found


def samples(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A line for each look. Time 0 is the neighbour's beginning; empty where nobody says."""
    return [
        {
            "time_s": f"{moment.time_s:.3f}",
            "run": run.number,
            "variant": run.variant,
            "stage": moment.stage,
            **_stall("inside", moment.inside),
            **_stall("outside", moment.outside),
            "resident_bytes": moment.resident_bytes,
            "swap_bytes": moment.swap_bytes,
            "cells": moment.live_cells,
            "tokens": moment.tokens,
            "token_s": "" if moment.token_s is None else f"{moment.token_s:.4f}",
            "neighbour_bytes": moment.neighbour_bytes,
        }
        for run in runs
        for moment in run.result.moments
    ]


def _stall(where: str, found: Shares | None) -> dict[str, str]:
    words = ("", "") if found is None else (f"{found.some:.4f}", f"{found.full:.4f}")
    return dict(zip((f"{where}_some", f"{where}_full"), words, strict=True))
