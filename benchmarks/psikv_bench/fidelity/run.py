"""The whole benchmark: its pieces in turn, and what is finished when it is cut short."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
from psi_kv_governor.bench import record
from psikv_bench.fidelity import chats, likelihood, retrieval, targets, texts
from psikv_bench.fidelity.keeping import check_same
from psikv_bench.fidelity.parts import Found, native, unrounded
from psikv_bench.fidelity.pieces import Kept, Piece
from psikv_bench.fidelity.plan import PARTS, Options, Plan, plan
from psikv_bench.fidelity.results import FidelityReport, Setting, TextUsed
from psikv_bench.fidelity.subject import Subject
from psikv_bench.fidelity.weights import Weights, choose, weights

from psi_kv_governor.config import GovernorConfig

Watch = Callable[[str, str, int, int], None]
"""Told (part, what is being done, steps done before, steps in all at most)."""


class Bench:
    """One run of the benchmark, piece by piece, into `found`."""

    def __init__(self, options: Options, watch: Watch, folder: Path | None) -> None:
        """Finished pieces are kept in `folder`. Raises BadInputError for what can't be measured as asked."""
        self.config = GovernorConfig()
        self.options = options
        self.plan: Plan = plan(options, self.config)
        self.weights: Weights = choose(options.model, options.weights)
        self.threads = options.threads or record.cores()
        self.found = Found()
        self.part = next(iter(PARTS))
        self.seconds = 0.0
        """That its pieces took, also in runs that were cut short."""
        measured = msgspec.structs.replace(self.setting, default_policy="")  # which is only judged by it
        size = options.model.stat().st_size
        self.kept = Kept(folder, (self.plan, measured, options.model.name, size, record.versions()))
        self._watch = watch

    def measure(self) -> None:
        """All parts. Raises BadInputError and PsiKvError where the model can't be measured."""
        self._all(self.weights, unrounded(self.plan, self.found))
        self._all("file", native(self.plan, self.found, self.config.policy))

    def _all(self, which: Weights, pieces: Iterable[Piece[Any]]) -> None:
        """The model is opened only where a piece is missing."""
        with ExitStack() as stack:
            subject: Subject | None = None
            for piece in pieces:
                if self.options.only and piece.part not in self.options.only:
                    continue
                self.part = piece.part
                kept = self.kept.get(piece)
                if kept is None:
                    subject = subject or stack.enter_context(self._subject(which))
                    began_s = time.monotonic()
                    result = piece.measure(subject, self._tick(piece))
                    kept = time.monotonic() - began_s, result
                    self.kept.put(piece, *kept)
                self.seconds += kept[0]
                piece.take(kept[1])

    @contextmanager
    def _subject(self, which: Weights) -> Iterator[Subject]:
        with (
            weights(self.options.model, which) as path,
            Subject(
                path,
                self.plan.compared,
                n_ctx=self.plan.n_ctx,
                threads=self.threads,
                cache=self.options.cache,
                config=self.config,
            ) as subject,
        ):
            yield subject

    def _tick(self, piece: Piece[Any]) -> likelihood.Tick:
        done = -1

        def tick(doing: str) -> None:
            nonlocal done
            done += 1
            self._watch(piece.part, doing, done, piece.steps)

        return tick

    def report(self, recorder: record.Recorder, unfinished: str) -> FidelityReport:
        """What was found so far, summed up and held against what is asked."""
        found, planned = self.found, self.plan
        kept = recorder.report([])
        return judged(
            FidelityReport(
                header=msgspec.structs.replace(kept.header, seconds=max(self.seconds, kept.header.seconds)),
                added={},
                passed=False,
                unfinished=unfinished,
                figures=[],
                setting=self.setting,
                likelihood=likelihood.summed(found.runs, planned),
                noise=next(iter(found.noise), None),
                gradual=likelihood.summed_gradual(found.steps, planned),
                tasks=retrieval.tasks(found.screened),
                retrieval=retrieval.summed(found.answered),
                conversation=chats.summed(found.talks),
                spikes=found.spikes,
                speed=next(iter(found.speed), None),
                trims_between_exact=sum(one.trims for one in found.texts),
                differing_logits=sum(one.differing_logits for one in found.texts),
            )
        )

    @property
    def setting(self) -> Setting:
        """All that the figures depend on beside the machine and the model."""
        planned, config = self.plan, self.config
        return Setting(
            policies=planned.names,
            default_policy=config.policy,
            shares=planned.shares,
            ctx=planned.ctx,
            texts=[
                TextUsed(
                    name=name, about=texts.ABOUT[name], fingerprint=texts.fingerprint(texts.read_text(name))
                )
                for name in planned.texts
            ],
            continuation=planned.continuation,
            seed=planned.seed,
            random_seeds=planned.random_seeds,
            cache=self.options.cache,
            weights=self.weights,
            sink_cells=config.sink_cells,
            window_cells=config.window_cells,
            block_cells=config.block_cells,
        )


def judged(report: FidelityReport) -> FidelityReport:
    """`report` held against what is asked."""
    figures = [
        *targets.likelihood_figures(report.likelihood, report.setting.default_policy),
        *targets.needle_figures(report.retrieval),
        *targets.exact_figures(
            report.spikes, report.differing_logits if report.trims_between_exact else None
        ),
        *targets.speed_figures(report.speed),
    ]
    passed = not report.unfinished and all(found.passed is not False for found in figures)
    return msgspec.structs.replace(report, figures=figures, passed=passed)


_OF_PART = {
    "texts": ("likelihood", "trims_between_exact", "differing_logits"),
    "steps": ("gradual",),
    "noise": ("noise",),
    "spike": ("spikes",),
    "facts": ("tasks", "retrieval"),
    "chats": ("conversation",),
    "speed": ("speed",),
}
"""The fields of a report that each part fills."""


def merged(earlier: FidelityReport, later: FidelityReport, parts: Iterable[str]) -> FidelityReport:
    """`earlier` with `parts` from `later`, judged anew."""
    changed = {name: getattr(later, name) for part in parts for name in _OF_PART[part]}
    added = {**earlier.added, **dict.fromkeys(parts, later.header)}
    return judged(
        msgspec.structs.replace(
            earlier, added=added, unfinished=later.unfinished, setting=later.setting, **changed
        )
    )


def run(
    options: Options,
    watch: Watch = lambda part, doing, done, total: None,
    folder: Path | None = None,
    earlier: FidelityReport | None = None,
) -> FidelityReport:
    """`psi-kv bench fidelity`. On Ctrl-C the report holds what was finished, and says what is missing.

    Finished pieces wait in `folder` until all are, so that the same run goes on from there. With `earlier`,
    what is measured now takes the place of its parts.

    Raises BadInputError for what can't be measured as asked, PsiKvError where the model can't be.
    """
    bench = Bench(options, watch, folder)
    if earlier is not None:
        check_same(earlier.setting, bench.setting)
    asked = record.Options(model=options.model, quick=options.quick, threads=options.threads)
    recorder = record.Recorder("fidelity", asked, [bench.threads])
    unfinished = ""
    try:
        bench.measure()
    except KeyboardInterrupt:
        again = "the same command goes on from here" if folder else "with --out-dir it could go on from here"
        unfinished = f"interrupted in the part {bench.part!r}, the rest is missing: {again}"
    else:
        bench.kept.clear()
    report = bench.report(recorder, unfinished)
    return merged(earlier, report, options.only) if earlier is not None else report
