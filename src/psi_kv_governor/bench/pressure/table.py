"""The table of the runs and the lines under it, as text: for the terminal and for summary.md."""

from __future__ import annotations

from collections.abc import Iterator

from psi_kv_governor.bench.pressure.figures import MB, RATIOS
from psi_kv_governor.bench.pressure.result import PressureResult, Run
from psi_kv_governor.bench.record import Figure
from psi_kv_governor.bench.script import SceneResult, Shares

COLUMNS = (
    "run", "variant", "decoded", "tok/s", "prunes", "final KV", "external PSI some/full",
    "inside PSI some/full", "returned", "peak resident", "p50/p99/max ms", "neighbour", "killed", "restored",
)  # fmt: skip
"""External: of the whole machine, /proc/pressure/memory. Inside: of the run's own cgroup."""

_SUMMED = (
    ("decoded", "tokens"), ("tokens/s", ""), ("prunes", ""), ("final KV", "cells"),
    ("PSI outside, some", ""), ("PSI outside, full", ""), ("PSI inside, some", ""), ("PSI inside, full", ""),
    ("returned", "MB"), ("peak resident", "MB"), ("p50 of a token", "ms"), ("p99 of a token", "ms"),
    ("longest token", "ms"), ("neighbour's work", "GB/s"), ("killed", "runs"),
    ("missing at the end", "cells"),
)  # fmt: skip


def row(run: Run) -> list[str]:
    """A run in the order of COLUMNS."""
    found = run.result
    return [
        str(run.number),
        run.variant,
        str(found.tokens),
        f"{found.tokens_per_s:.1f}",
        str(found.trims),
        f"{found.final_cells:,}",
        _shares(found.outside),
        _shares(None if found.stall is None else Shares(found.stall, found.stall_full or 0.0)),
        f"{found.bytes_returned / MB:.1f} MB",
        f"{found.peak_resident_bytes / MB:.0f} MB",
        "/".join(
            "-" if value is None else f"{value * 1e3:.0f}"
            for value in (found.p50_s, found.p99_s, found.max_s)
        ),
        "-" if found.neighbour_bytes_per_s is None else f"{found.neighbour_bytes_per_s / 1e9:.1f} GB/s",
        _killed(found),
        _restored(found),
    ]


def _shares(found: Shares | None) -> str:
    return "-" if found is None else f"{found.some:.0%}/{found.full:.0%}"


def _killed(found: SceneResult) -> str:
    if found.killed:
        return "yes"
    return "neighbour" if found.neighbour_killed else "no"


def _restored(found: SceneResult) -> str:
    if found.restored is None:
        return "-"
    if found.killed:
        return "killed"
    return "all" if found.restored else f"{found.missing_cells:,} gone"


def medians(result: PressureResult) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of medians, a column a variant."""
    figures = {(found.case, found.name): found for found in result.report.figures}
    variants = [
        name for name in dict.fromkeys(found.case for found in result.report.figures) if name != RATIOS
    ]
    rows = []
    for name, unit in _SUMMED:
        cells = [spread(figures[case, name]) if (case, name) in figures else "-" for case in variants]
        rows.append([f"{name}, {unit}" if unit else name, *cells])
    return ["median (min to max)", *variants], rows


def spread(found: Figure) -> str:
    """Median, and least and most."""
    median, least, most = (_told(value, found.unit) for value in (found.median, found.min, found.max))
    return f"{median} ({least} to {most})"


def verdicts(result: PressureResult) -> Iterator[str]:
    """A line for each figure that something was asked of."""
    for found in result.report.figures:
        if found.asked is not None:
            met = "met" if found.passed else "MISSED"
            of = "" if found.case == RATIOS else f"{found.case}: "
            asked = f"{found.asked.sign} {_told(found.asked.bound, found.unit)}"
            which = "" if found.asked.statistic == "median" else f" ({found.asked.statistic})"
            yield f"{met}: {of}{found.name} {spread(found)}, asked {asked}{which}"


def ratios(result: PressureResult) -> Iterator[Figure]:
    """The figures that compare two variants."""
    return (found for found in result.report.figures if found.case == RATIOS)


def circumstances(result: PressureResult) -> Iterator[str]:
    """What it was measured on."""
    header, setting = result.report.header, result.setting
    machine = header.machine
    yield f"`{header.command}`, {header.started_utc}, {header.seconds / 60:.1f} min"
    yield (
        f"{machine.processor}, {machine.cores} cores, {machine.memory_bytes / 2**30:.1f} GiB, "
        f"{machine.kernel}; " + ", ".join(f"{name} {version}" for name, version in header.versions.items())
    )
    yield f"load average {header.load_before:.2f} before, {header.load_after:.2f} after"
    yield scene_words(result)
    yield setting.same
    yield (
        f"reference: polls {setting.reference['polls']} every {setting.reference['every_s']:g} s; at "
        f"{setting.reference['threshold']:.0%} everything between --keep and --tail goes, if at least "
        f"{setting.reference['min_prune']} tokens"
    )
    yield (
        "neighbour's work: bytes filled, touched (a byte a page counts as the page) or read while tokens "
        "were decoded; in ratios, while both runs were still decoding"
    )


def scene_words(result: PressureResult) -> str:
    """What was played, in a line."""
    options, setting = result.options, result.setting
    where = "no cgroup"
    if setting.limit_bytes is not None:
        where = f"a memory cgroup of {setting.limit_bytes / MB:.0f} MB, swap: {setting.swap}"
    load = f"a neighbour ({options.load}) of {setting.pressure_bytes / MB:.0f} MB"
    if not setting.pressure_bytes:
        load = "no neighbour"
    return (
        f"{result.report.header.model}, {options.ctx_size:,} cells, {setting.prompt_tokens:,} tokens of "
        f"prompt, {options.n_predict} decoded on {options.threads} "
        f"thread{'s' if options.threads > 1 else ''}; {where}; {load}"
    )


def _told(value: float, unit: str) -> str:
    if unit in {"tokens", "cells", "runs", "times"}:
        return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"
    if unit == "share":
        return f"{value:.0%}"
    return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
