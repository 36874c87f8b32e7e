"""`psi-kv bench capacity`: the probes from the options to the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from psi_kv_governor.bench.record import Asked, Figure, Options, Recorder, Say, figure
from psi_kv_governor.bench.sampling import percentile
from psi_kv_governor.bench.script import MIB
from psi_kv_governor.bench.trials import plots
from psi_kv_governor.bench.trials.capacity import Prober, auto_limits, in_peace
from psi_kv_governor.bench.trials.capacity_plan import (
    NO_LIMIT,
    THRASH_SHARE,
    CapacityOptions,
    Probe,
    longest,
)
from psi_kv_governor.bench.trials.journal import Plan
from psi_kv_governor.bench.trials.keep import Table, TrialsReport, opened, save
from psi_kv_governor.bench.trials.oom_plan import NAMES, VARIANTS
from psi_kv_governor.errors import PsiKvError

CLAIMED = Asked(">=", 4.0)
QUICK = CapacityOptions(most_tokens=4096, resolution=2.0, tokens=8)


def run(
    options: Options,
    asked: CapacityOptions,
    folder: Path | None,
    say: Say = lambda doing: None,
    *,
    resume: bool,
) -> TrialsReport:
    """Probe what is not yet in the journal of `folder`, and report. Raises BadInputError or PsiKvError."""
    plan = Plan.of("capacity", options.model, asked)
    journal = opened(folder, "probes.jsonl", plan, Probe, swap=asked.swap, resume=resume)
    recorder = Recorder("capacity", options, [asked.threads])
    interrupted = False
    try:
        peace = in_peace(options.model, asked, journal, say)
        prober = Prober(options.model, _completed(asked, peace, quick=options.quick), journal, say)
        prober.compare_all()
    except KeyboardInterrupt:
        interrupted = True
    probes = [probe for probe in journal.parts if probe.limit_bytes != NO_LIMIT]
    if not probes:
        raise PsiKvError("interrupted before the first probe was finished: there is nothing to report")
    asked = _completed(asked, in_peace(options.model, asked, journal, say), quick=options.quick)
    # The short form ends at a length that says little about the gain.
    report = TrialsReport.of(
        recorder,
        list(figures(probes, None if options.quick else CLAIMED)),
        options={"asked": asked},
        interrupted=interrupted,
        tables=[best_table(probes), probes_table(probes)],
        notes=_notes(asked),
        rows=msgspec.to_builtins(list(probes)),
    )
    if folder is not None:
        save(report, folder, "probes.csv", records(probes), plots.drawn(plots.capacity, probes))
    return report


def _completed(asked: CapacityOptions, peace: Probe, *, quick: bool) -> CapacityOptions:
    """What was asked for, with what was left to the model's own need and speed.

    Raises PsiKvError where the kernel keeps no peak to work the limits out from.
    """
    limits = asked.limits_bytes
    if not limits:
        if not peace.peak_bytes:
            raise PsiKvError("this kernel keeps no peak of a cgroup: give the limits with --limits")
        limits = auto_limits(peace.peak_bytes)[: 1 if quick else None]
    least = asked.least_tokens_per_s or THRASH_SHARE * (peace.tokens_per_s or 0.0)
    return msgspec.structs.replace(asked, limits_bytes=limits, least_tokens_per_s=least)


def limits_of(probes: Sequence[Probe]) -> list[int]:
    """The limits, smallest first."""
    return sorted({probe.limit_bytes for probe in probes})


def figures(probes: Sequence[Probe], asked: Asked | None = CLAIMED) -> Iterator[Figure]:
    """The gain at each limit, beside what is claimed for the method."""
    for limit in limits_of(probes):
        fixed, governed = longest(probes, "fixed", limit), longest(probes, "psi", limit)
        if fixed is None or governed is None:
            continue
        case = f"{limit // MIB} MiB"
        yield figure("context, governed over fixed", "x", [governed.length / fixed.length], asked, case=case)
        yield figure("of it live at the end", "share", [governed.live_share], case=case)
        if fixed.tokens_per_s and governed.tokens_per_s:
            ratio = governed.tokens_per_s / fixed.tokens_per_s
            yield figure("tokens per second, governed over fixed", "x", [ratio], case=case)


def best_table(probes: Sequence[Probe]) -> Table:
    """The longest that survived."""
    rows = []
    for limit in limits_of(probes):
        for variant in VARIANTS:
            best = longest(probes, variant, limit)
            if best is None:
                rows.append([f"{limit // MIB}", NAMES[variant], "none", *["-"] * 7])
            else:
                rows.append(
                    [
                        f"{limit // MIB}",
                        NAMES[variant],
                        f"{best.length:,}",
                        f"{best.live_share:.0%}",
                        f"{best.spilled_cells:,}",
                        f"{best.lost_cells:,}",
                        _rate(best.prefill_tokens_per_s),
                        _rate(best.tokens_per_s),
                        f"{1000 * percentile(best.token_s, 0.99):.0f}",
                        f"{best.peak_bytes / MIB:.0f}",
                    ]
                )
    columns = ["limit MiB", "variant", "longest", "live", "in the store", "lost", "prompt tok/s", "tok/s"]
    return Table(
        title="The longest context that survives", columns=[*columns, "p99 ms", "peak MiB"], rows=rows
    )


def probes_table(probes: Sequence[Probe]) -> Table:
    """Every probe in its order."""
    rows = [
        [
            f"{probe.limit_bytes // MIB}",
            NAMES[probe.variant],
            f"{probe.length:,}",
            probe.ending,
            f"{probe.done_tokens:,}",
            f"{probe.live_cells:,}",
            _rate(probe.tokens_per_s),
            " ".join(filter(None, (probe.why, probe.last_turn))),
        ]
        for probe in probes
    ]
    columns = ["limit MiB", "variant", "tokens", "ending", "came to", "live cells", "tok/s", "why"]
    return Table(title="Probes", columns=columns, rows=rows)


def _notes(asked: CapacityOptions) -> list[str]:
    return [
        f"survived: the prompt was decoded in chunks of {asked.chunk}, and {asked.tokens} tokens after it; "
        f"the kernel killed nobody, and neither a chunk nor the decoding was slower than "
        f"{asked.least_tokens_per_s:.3g} tokens per second (left out: a tenth of what the model does with a "
        "short context and memory to spare): slower, it reads its weights again for every token",
        "fixed: plain llama_cpp.Llama with n_ctx of just that length, every token attended to",
        "governed: positions that are away are known and come back when there is room, but a token decoded "
        "now attends to the live ones alone: the share is in the table. The floor keeps a fifth live, so no "
        "more than 5 times what fits is possible with the default settings",
    ]


def records(probes: Sequence[Probe]) -> list[dict[str, Any]]:
    """A flat line for each probe."""
    lines = []
    for probe in probes:
        line = msgspec.structs.asdict(probe)
        line.pop("token_s")
        lines.append({**line, "tokens_per_s": probe.tokens_per_s, "live_share": probe.live_share})
    return lines


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
