"""The whole benchmark: its parts in turn, and what is finished when it is cut short."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from psi_kv_governor.bench import record
from psi_kv_governor.bench.fidelity import chats, likelihood, retrieval, speed, spike, targets, texts
from psi_kv_governor.bench.fidelity.metrics import PerToken
from psi_kv_governor.bench.fidelity.plan import Options, Plan, plan
from psi_kv_governor.bench.fidelity.results import FidelityReport, Likelihood, Setting, Speed, Spike, TextUsed
from psi_kv_governor.bench.fidelity.subject import Subject
from psi_kv_governor.bench.fidelity.weights import Weights, choose, weights
from psi_kv_governor.config import GovernorConfig

T = TypeVar("T")

Watch = Callable[[str, str, int, int], None]
"""Told (part, what is being done, steps done before, steps in all at most)."""


@dataclass
class Found:
    """What has been measured so far; a part that was cut short keeps what it had."""

    distributions: likelihood.Measured = field(default_factory=likelihood.Measured)
    noise: likelihood.Run | None = None
    gradual: list[tuple[str, PerToken, PerToken]] = field(default_factory=list)
    screened: list[retrieval.Outcome] = field(default_factory=list)
    answered: list[retrieval.Outcome] = field(default_factory=list)
    talks: list[chats.Talk] = field(default_factory=list)
    spikes: list[Spike] = field(default_factory=list)
    speed: Speed | None = None


class Bench:
    """One run of the benchmark, part by part, into `found`."""

    def __init__(self, options: Options, watch: Watch) -> None:
        """Raises BadInputError for what can't be measured as asked."""
        self.config = GovernorConfig()
        self.options = options
        self.plan: Plan = plan(options, self.config)
        self.weights: Weights = choose(options.model, options.weights)
        self.threads = options.threads or record.cores()
        self.found = Found()
        self.part = "opening the model"
        self._watch = watch

    def measure(self) -> None:
        """All parts. Raises BadInputError and PsiKvError where the model can't be measured."""
        found, planned = self.found, self.plan
        # The distributions are compared without the arithmetic's noise, the rest as users have the model.
        with self._subject(self.weights) as model:
            tick = self._begin("texts", likelihood.steps(planned))
            likelihood.measure(model, planned, tick, found.distributions)
            tick = self._begin("in steps", likelihood.gradual_steps(planned))
            _keep(found.gradual, likelihood.measure_gradual(model, planned, tick))
        with self._subject("file") as model:
            found.noise = likelihood.control(model, planned, self._begin("noise", 1))
            _keep(found.spikes, spike.measure(model, planned, self._begin("spike", spike.steps(planned))))
            found.speed = speed.measure(model, planned, self._begin("speed", speed.steps(planned)))
            tick = self._begin("hidden facts", retrieval.steps(planned))
            _keep(found.screened, retrieval.screen(model, planned, tick))
            able = frozenset(task.name for task in retrieval.tasks(found.screened) if task.able)
            _keep(found.answered, retrieval.measure(model, planned, able, tick))
            _keep(found.talks, chats.measure(model, planned, self._begin("chats", chats.steps(planned))))

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

    def report(self, recorder: record.Recorder, unfinished: str) -> FidelityReport:
        """What was found so far, summed up and held against what is asked."""
        found, planned = self.found, self.plan
        lines = likelihood.summed(found.distributions.runs, planned)
        answers = retrieval.summed(found.answered)
        exact = found.distributions.exact
        figures = [
            *targets.likelihood_figures(lines, self.config.policy),
            *targets.needle_figures(answers),
            *targets.exact_figures(found.spikes, exact.differing_logits if exact.trims else None),
            *targets.speed_figures(found.speed),
        ]
        kept = recorder.report(figures)
        return FidelityReport(
            header=kept.header,
            passed=kept.passed and not unfinished,
            unfinished=unfinished,
            figures=figures,
            setting=self._setting(),
            likelihood=lines,
            noise=self._noise(),
            gradual=likelihood.summed_gradual(found.gradual, planned),
            tasks=retrieval.tasks(found.screened),
            retrieval=answers,
            conversation=chats.summed(found.talks),
            spikes=found.spikes,
            speed=found.speed,
            trims_between_exact=exact.trims,
            differing_logits=exact.differing_logits,
        )

    def _noise(self) -> Likelihood | None:
        run = self.found.noise
        if run is None:
            return None
        return likelihood.line(
            [run.seen], self.plan.seed, text=run.text, ctx=run.ctx, policy=run.policy, share=run.share
        )

    def _setting(self) -> Setting:
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

    def _begin(self, part: str, steps: int) -> likelihood.Tick:
        self.part = part
        done = -1

        def tick(doing: str) -> None:
            nonlocal done
            done += 1
            self._watch(part, doing, done, steps)

        return tick


def _keep(kept: list[T], measured: Iterable[T]) -> None:
    """One by one, so that what is finished is kept when the rest is cut short."""
    for one in measured:
        kept.append(one)


def run(options: Options, watch: Watch = lambda part, doing, done, total: None) -> FidelityReport:
    """`psi-kv bench fidelity`. On Ctrl-C the report holds what was finished, and says what is missing.

    Raises BadInputError for what can't be measured as asked, PsiKvError where the model can't be.
    """
    bench = Bench(options, watch)
    asked = record.Options(model=options.model, quick=options.quick, threads=options.threads)
    recorder = record.Recorder("fidelity", asked, [bench.threads])
    unfinished = ""
    try:
        bench.measure()
    except KeyboardInterrupt:
        unfinished = f"interrupted in the part {bench.part!r}: what was finished is here, the rest is missing"
    return bench.report(recorder, unfinished)
