"""What the runs say: medians with their spread, ratios within each repeat, and what was asked of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from psi_kv_governor.bench.messages import Variant
from psi_kv_governor.bench.pressure.options import VARIANTS
from psi_kv_governor.bench.pressure.result import Run, whole_repeats
from psi_kv_governor.bench.record import Asked, Figure, figure
from psi_kv_governor.bench.script import SceneResult
from psi_kv_governor.bench.watch import amount_at

MB = 1_000_000

RATIOS = "ratios"
"""Case of the figures that compare two runs of one repeat."""

SPEED, P99, WORK, PEAK = "tokens/s", "p99 of a token", "neighbour's work", "peak resident"

_ASKED: dict[tuple[Variant, Variant], dict[str, Asked]] = {
    ("psi", "fixed"): {
        SPEED: Asked(">=", 2.5),
        P99: Asked("<=", 0.5),
        WORK: Asked(">=", 1.0),
        PEAK: Asked("<=", 0.5),
    },
    ("psi", "reference"): {SPEED: Asked(">=", 2.5), P99: Asked("<=", 0.5)},
    ("fixed", "reference"): {},
}
_ASKED_CALM: dict[tuple[Variant, Variant], dict[str, Asked]] = {
    ("psi", "fixed"): {SPEED: Asked(">=", 0.99)},
    ("psi", "reference"): {},
    ("fixed", "reference"): {},
}
_NOTHING_RETURNED = Asked("<=", 1.0, "max")
"""MB that the reference may return and still have returned nothing."""
_NONE = Asked("<=", 0.0, "max")


def figures(
    runs: Sequence[Run], variants: Sequence[Variant], *, calm: bool, judged: bool
) -> Iterator[Figure]:
    """All figures. `calm`: there was no neighbour; `judged`: what is asked was asked of this setting."""
    asked_of = _ASKED_CALM if calm else _ASKED
    for (one, other), asked in asked_of.items():
        if one in variants and other in variants:
            yield from _ratios(runs, (one, other), variants, asked if judged else {})
    for variant in (name for name in VARIANTS if name in variants):
        found = [run.result for run in runs if run.variant == variant]
        if found:
            yield from _of_variant(variant, found, judged=judged and not calm)


def _ratios(
    runs: Sequence[Run], pair: tuple[Variant, Variant], variants: Sequence[Variant], asked: dict[str, Asked]
) -> Iterator[Figure]:
    repeats = whole_repeats(runs, variants)
    for name, measure in _MEASURES.items():
        values = []
        for repeat in repeats:
            one, other = repeat[pair[0]], repeat[pair[1]]
            ours, theirs = measure(one, other), measure(other, one)
            if ours is not None and theirs:
                values.append(ours / theirs)
        if values:
            yield figure(f"{pair[0]} / {pair[1]}, {name}", "x", values, asked.get(name), case=RATIOS)


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


def _of_variant(variant: Variant, found: Sequence[SceneResult], *, judged: bool) -> Iterator[Figure]:
    """The columns of the table, summed up over the repeats."""
    whole = _NONE if judged and variant == "psi" else None
    returned = _NOTHING_RETURNED if judged and variant == "reference" else None

    def of(
        name: str, unit: str, measure: Callable[[SceneResult], float | None], asked: Asked | None = None
    ) -> Iterator[Figure]:
        values = [value for value in map(measure, found) if value is not None]
        if values:
            yield figure(name, unit, values, asked, case=variant)

    yield from of("decoded", "tokens", lambda run: run.tokens)
    yield from of(SPEED, "tokens/s", lambda run: run.tokens_per_s)
    yield from of("speed in peace", "tokens/s", lambda run: run.calm_tokens_per_s)
    yield from of("prunes", "times", lambda run: run.trims)
    yield from of("first prune after", "s", lambda run: run.first_trim_s)
    yield from of("final KV", "cells", lambda run: run.final_cells)
    yield from of("PSI outside, some", "share", lambda run: run.outside.some if run.outside else None)
    yield from of("PSI outside, full", "share", lambda run: run.outside.full if run.outside else None)
    yield from of("PSI inside, some", "share", lambda run: run.stall)
    yield from of("PSI inside, full", "share", lambda run: run.stall_full)
    yield from of("returned", "MB", lambda run: run.bytes_returned / MB, returned)
    yield from of(PEAK, "MB", lambda run: run.peak_resident_bytes / MB)
    yield from of("least resident", "MB", lambda run: run.least_resident_bytes / MB)
    yield from of("most in swap", "MB", lambda run: run.most_swapped_bytes / MB)
    yield from of("p50 of a token", "ms", lambda run: 1e3 * or_all(run, run.p50_s))
    yield from of(P99, "ms", lambda run: 1e3 * or_all(run, run.p99_s))
    yield from of("longest token", "ms", lambda run: 1e3 * or_all(run, run.max_s))
    yield from of(WORK, "GB/s", lambda run: (run.neighbour_bytes_per_s or 0.0) / 1e9)
    yield from of("killed", "runs", lambda run: float(run.killed), whole)
    yield from of("neighbour killed", "runs", lambda run: float(run.neighbour_killed))
    yield from of("missing at the end", "cells", lambda run: run.missing_cells, whole)
