"""`psi-kv bench oom`: the trials from the options to the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from psi_kv_governor.bench.messages import Variant
from psi_kv_governor.bench.record import Options, Recorder, Say
from psi_kv_governor.bench.trials import oom_report, plots
from psi_kv_governor.bench.trials.host import Setup
from psi_kv_governor.bench.trials.journal import Journal, Plan
from psi_kv_governor.bench.trials.keep import TrialsReport, opened, save
from psi_kv_governor.bench.trials.oom import Runner
from psi_kv_governor.bench.trials.oom_plan import (
    NAMES,
    QUICK_RATES,
    OomOptions,
    Trial,
    rate_words,
    remaining,
)
from psi_kv_governor.bench.trials.sizing import deadly, kill_excess, prepared, trimmed_room
from psi_kv_governor.config import load_config
from psi_kv_governor.errors import PsiKvError

QUICK = OomOptions(context_tokens=2048, runs=6, rates=QUICK_RATES, hold_s=1.0, mmap=False)
"""With the weights in memory a context of 2,048 tokens is enough, which is decoded in half a minute."""


def run(
    options: Options, asked: OomOptions, folder: Path | None, say: Say = lambda doing: None, *, resume: bool
) -> TrialsReport:
    """Run what is not yet in the journal of `folder`, and report on all of it.

    Ctrl-C ends it early: the trials that are finished are reported. Raises BadInputError or PsiKvError.
    """
    plan = Plan.of("oom", options.model, msgspec.structs.replace(asked, runs=1))
    journal = opened(folder, "trials.jsonl", plan, Trial, resume=resume)
    recorder = Recorder("oom", options, [asked.threads])
    ahead = list(remaining(asked, [(trial.variant, trial.rate) for trial in journal.parts]))
    scene, interrupted = _run(options, asked, journal, ahead, say) if ahead else (None, False)
    if not journal.parts:
        raise PsiKvError("interrupted before the first run was finished: there is nothing to report")
    report = _report(recorder, asked, journal.parts, scene, interrupted=interrupted)
    if folder is not None:
        cells = oom_report.cells(journal.parts)
        lines = oom_report.records(journal.parts)
        save(report, folder, "trials.csv", lines, plots.drawn(plots.kills, cells))
    return report


def _run(
    options: Options,
    asked: OomOptions,
    journal: Journal[Trial],
    ahead: Sequence[tuple[Variant, float]],
    say: Say,
) -> tuple[oom_report.Scene, bool]:
    """Do what is ahead; gives what it was done in, and whether Ctrl-C ended it."""
    config = load_config()
    setup = Setup(
        model=str(options.model), context_tokens=asked.context_tokens, threads=asked.threads, mmap=asked.mmap
    )
    with prepared(setup, say) as (ready, need):
        # What was begun goes on in pens of the same size: measured again, it could differ by a MiB.
        begun = journal.parts[0].sizes if journal.parts else None
        sizes = begun or deadly(need, config, asked.limit_bytes, asked.load_bytes)
        scene = oom_report.Scene(
            need=need,
            sizes=sizes,
            kill_excess_bytes=kill_excess(need, sizes),
            trimmed_room_bytes=trimmed_room(need, config, sizes),
        )
        with Runner(ready, need, sizes, asked, config=config, say=say) as runner:
            try:
                for number, (variant, rate) in enumerate(ahead, len(journal.parts) + 1):
                    killed = sum(map(oom_report.died, journal.parts))
                    what = f"{NAMES[variant]}, {rate_words(rate)}"
                    say(f"run {number} of {asked.runs}: {what}; {killed} killed so far")
                    journal.add(runner.run(number, variant, rate))
            except KeyboardInterrupt:
                return scene, True
    return scene, False


def _report(
    recorder: Recorder,
    asked: OomOptions,
    trials: Sequence[Trial],
    scene: oom_report.Scene | None,
    *,
    interrupted: bool,
) -> TrialsReport:
    return TrialsReport.of(
        recorder,
        list(oom_report.figures(trials)),
        options={"asked": asked, "scene": scene},
        interrupted=interrupted,
        tables=oom_report.tables(trials),
        notes=oom_report.notes(trials, scene),
        rows=msgspec.to_builtins(oom_report.cells(trials)),
    )
