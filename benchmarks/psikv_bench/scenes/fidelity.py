"""What the model still knows when a policy gave up a part of its context, against the full cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.sandbox.messages import Setup
from psikv_bench.fidelity import chats, likelihood, plots, retrieval, speed, spike, tables, targets, texts
from psikv_bench.fidelity.likelihood import Tick
from psikv_bench.fidelity.plan import PARTS, FidelityOptions, Plan, plan
from psikv_bench.fidelity.results import Likelihood, Rows, Setting, Speed, Spike, TextUsed
from psikv_bench.fidelity.subject import Subject
from psikv_bench.fidelity.weights import Weights, choose, weights
from psikv_bench.figures import Figure
from psikv_bench.journal import Journal, decoded, encoded
from psikv_bench.machine import cores
from psikv_bench.record import RESULT, Recorder, Report
from psikv_bench.scene import Scene


@dataclass
class Found:
    """What has been measured so far."""

    texts: list[likelihood.Measured] = field(default_factory=list)
    steps: list[likelihood.Steps] = field(default_factory=list)
    noise: list[Likelihood] = field(default_factory=list)
    spikes: list[Spike] = field(default_factory=list)
    screened: list[retrieval.Outcome] = field(default_factory=list)
    answered: list[retrieval.Outcome] = field(default_factory=list)
    talks: list[chats.Talk] = field(default_factory=list)
    speed: list[Speed] = field(default_factory=list)


@dataclass(frozen=True)
class Piece:
    """A part of the benchmark that is measured in one go, in a minute or so on one core."""

    part: str
    name: str
    """Unlike all others of the part."""
    kind: Any
    """Type of the result: what JSON can hold, and arrays of float64."""
    measure: Callable[[Subject, Tick], Any]
    take: Callable[[Any], None]
    """Where the result goes."""


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """A piece in the journal."""

    part: str
    name: str
    seconds: float
    result: msgspec.Raw


def unrounded(planned: Plan, found: Found) -> Iterator[Piece]:
    """What is measured without the arithmetic's noise, where the weights are taken to f32."""
    for name in planned.texts:
        for ctx in planned.ctx:
            measure = _with(likelihood.measure, planned, name, ctx)
            yield Piece("texts", f"{name}-{ctx}", likelihood.Measured, measure, found.texts.append)
    for name in planned.texts[: planned.gradual_texts]:
        measure = _with(likelihood.measure_gradual, planned, name)
        yield Piece("steps", name, list[likelihood.Steps], measure, found.steps.extend)


def native(planned: Plan, found: Found) -> Iterator[Piece]:
    """What is measured with the model as users have it."""
    yield Piece("noise", "one", Likelihood, _with(likelihood.control, planned), found.noise.append)
    yield Piece("spike", "one", list[Spike], _with(spike.measure, planned), found.spikes.extend)
    outcomes = list[retrieval.Outcome]
    yield Piece("facts", "full", outcomes, _with(retrieval.screen, planned), found.screened.extend)
    # Only now: whoever takes the pieces one by one has taken the full cache's answers by here.
    able = frozenset(task.name for task in retrieval.tasks(found.screened) if task.able)
    for i in range(planned.haystacks):
        measure = _with(retrieval.measure, planned, i, able)
        yield Piece("facts", str(i), outcomes, measure, found.answered.extend)
    for i in range(planned.chats):
        yield Piece("chats", str(i), list[chats.Talk], _with(chats.measure, planned, i), found.talks.extend)
    yield Piece("speed", "one", Speed, _with(speed.measure, planned), found.speed.append)


def _with(measure: Callable[..., Any], planned: Plan, *what: object) -> Callable[[Subject, Tick], Any]:
    return lambda subject, tick: measure(subject, planned, *what, tick)


class Bench:
    """One run of the benchmark, piece by piece, into `found`."""

    def __init__(self, recorder: Recorder[FidelityOptions]) -> None:
        """Raises BadInputError for what can't be measured as asked."""
        self.recorder, self.options = recorder, recorder.options
        self.config = GovernorConfig()
        self.plan: Plan = plan(self.options, self.config, quick=recorder.quick)
        self.weights: Weights = choose(recorder.model, cast(Weights, self.options.weights) or None)
        self.threads = self.options.threads or cores()
        self.found = Found()
        self._journal: Journal[Finished] = Journal(None, b"", Finished, go_on=False)
        if not self.options.only:  # a part that is measured anew is measured from its beginning
            measured = msgspec.structs.replace(self.setting, default_policy="")  # which is only judged by it
            self._journal = recorder.journal(Finished, {"setting": measured, "quick": recorder.quick})

    def measure(self) -> None:
        """All parts. Raises BadInputError and PsiKvError where the model can't be measured."""
        self._all(self.weights, unrounded(self.plan, self.found))
        self._all("file", native(self.plan, self.found))

    def _all(self, which: Weights, pieces: Iterable[Piece]) -> None:
        """The model is opened only where a piece is missing."""
        done = {(one.part, one.name): one for one in self._journal.parts}
        with ExitStack() as stack:
            subject: Subject | None = None
            for piece in pieces:
                if self.options.only and piece.part not in self.options.only:
                    continue
                finished = done.get((piece.part, piece.name))
                if finished is None:
                    subject = subject or stack.enter_context(self._subject(stack, which))
                    began_s = time.monotonic()
                    result = encoded(piece.measure(subject, self._tick(piece.part)))
                    seconds = time.monotonic() - began_s
                    finished = Finished(
                        part=piece.part, name=piece.name, seconds=seconds, result=msgspec.Raw(result)
                    )
                    self._journal.add(finished)
                piece.take(decoded(finished.result, piece.kind))

    def _subject(self, stack: ExitStack, which: Weights) -> Subject:
        path = stack.enter_context(weights(self.recorder.model, which))
        setup = Setup(
            variant="psi", model=str(path), auto=False, threads=self.threads, prefill_threads=self.threads,
            cache=self.options.cache,
        )  # fmt: skip
        return Subject(setup, self.plan.compared, self.plan.n_ctx)

    def _tick(self, part: str) -> Tick:
        return lambda doing: self.recorder.say(f"{part}: {doing}")

    def rows(self) -> Rows:
        """What was found so far, summed up."""
        found, planned = self.found, self.plan
        runs = [run for measured in found.texts for run in measured.runs]
        return Rows(
            setting=self.setting,
            likelihood=likelihood.summed(runs, planned),
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


def figures(rows: Rows) -> Iterator[Figure]:
    """What is held against what is asked."""
    yield from targets.likelihood_figures(rows.likelihood, rows.setting.default_policy)
    yield from targets.needle_figures(rows.retrieval)
    differ = rows.differing_logits if rows.trims_between_exact else None
    yield from targets.exact_figures(rows.spikes, differ)
    yield from targets.speed_figures(rows.speed)


# -- parts that are measured anew --------------------------------------------------------------------------

_OF_PART = {
    "texts": ("likelihood", "trims_between_exact", "differing_logits"),
    "steps": ("gradual",),
    "noise": ("noise",),
    "spike": ("spikes",),
    "facts": ("tasks", "retrieval"),
    "chats": ("conversation",),
    "speed": ("speed",),
}
"""The fields of the rows that each part fills."""


def recorded(folder: Path | None) -> Rows | None:
    """The rows that `folder` holds; None where there are none. Raises BadInputError for damaged ones."""
    path = folder and folder / RESULT
    if path is None or not path.exists():
        return None
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
        return msgspec.json.decode(kept["rows"], type=Rows)
    except (OSError, KeyError, msgspec.DecodeError) as error:
        raise BadInputError(f"{path} is no report of this benchmark: {error}".splitlines()[0]) from error


def as_recorded(options: FidelityOptions, setting: Setting) -> FidelityOptions:
    """`options`, with what they leave open as in `setting`: a part of it is measured anew."""
    return msgspec.structs.replace(
        options,
        policies=options.policies or tuple(setting.policies),
        shares=options.shares or tuple(setting.shares),
        ctx=options.ctx or tuple(setting.ctx),
        texts=options.texts or tuple(text.name for text in setting.texts),
        weights=options.weights or setting.weights,
    )


def merged(earlier: Rows, later: Rows, parts: Iterable[str], header: Any) -> Rows:
    """`earlier` with `parts` from `later`. Raises BadInputError where they were measured otherwise.

    The default policy may differ: what was measured is judged by it, and is the same.
    """
    for name in Setting.__struct_fields__:
        if name != "default_policy" and getattr(earlier.setting, name) != getattr(later.setting, name):
            raise BadInputError(f"the report in that folder is of other {name}: give another one (--out-dir)")
    changed = {name: getattr(later, name) for part in parts for name in _OF_PART[part]}
    added = {**earlier.added, **dict.fromkeys(parts, header)}
    return msgspec.structs.replace(earlier, added=added, setting=later.setting, **changed)


def run(recorder: Recorder[FidelityOptions]) -> Report:
    """Ctrl-C keeps what is finished. Raises BadInputError for what can't be measured as asked."""
    only = recorder.options.only
    earlier = recorded(recorder.folder) if only else None
    if earlier is not None:
        recorder.options = as_recorded(recorder.options, earlier.setting)
        merged(earlier, Rows(setting=Bench(recorder).setting), (), None)  # before hours are spent
    bench = Bench(recorder)
    interrupted = False
    try:
        bench.measure()
    except KeyboardInterrupt:
        interrupted = True
    rows = bench.rows()
    if earlier is not None:
        rows = merged(earlier, rows, only, recorder.report([], [bench.threads]).header)
    report = recorder.report(
        list(figures(rows)),
        [bench.threads],
        interrupted=interrupted,
        tables=tables.tables(rows),
        notes=list(tables.notes(rows)),
        rows=rows,
    )
    return recorder.save(report, (), *plots.draws(rows))


SCENE = Scene(
    about=f"""What is lost when a part of the context is given up, policy by policy, against the full cache.

    Next-token distributions, perplexity, hidden facts, chats, and answers after a spike. The parts are
    {", ".join(PARTS)}.
    """,
    options=FidelityOptions(),
    quick=FidelityOptions(),
    run=run,
    examples=(
        "psi-kv bench fidelity --quick",
        "psi-kv bench fidelity --policies window,hybrid --shares 0.5 --ctx 4096 --out-dir fidelity",
    ),
)
