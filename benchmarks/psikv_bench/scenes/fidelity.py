"""What the model still knows when a policy gave up a part of its context, against the full cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import msgspec

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.sandbox.messages import Setup
from psikv_bench.fidelity import chats, likelihood, plots, retrieval, spike, tables, targets
from psikv_bench.fidelity.contenders import FULL
from psikv_bench.fidelity.plan import PARTS, FidelityOptions, Part, Plan, plan
from psikv_bench.fidelity.results import Rows, Spike
from psikv_bench.fidelity.subject import Subject
from psikv_bench.fidelity.weights import Weights, weights
from psikv_bench.journal import Journal, decoded, encoded
from psikv_bench.machine import cores
from psikv_bench.record import Recorder, Report
from psikv_bench.scene import Scene

_KINDS: dict[Part, Any] = {
    "texts": list[likelihood.Run],
    "spike": list[Spike],
    "facts": list[retrieval.Outcome],
    "chats": list[retrieval.Outcome],
}
"""What a piece of each part finds: what JSON can hold, and arrays of float64."""

Found = dict[Part, list[Any]]


class Piece(NamedTuple):
    """A part of the benchmark that is measured in one go, in a minute or so on one core."""

    part: Part
    name: str
    """Unlike all others of the part."""
    measure: Callable[..., list[Any]]


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """A piece in the journal."""

    part: Part
    name: str
    result: msgspec.Raw


def pieces(planned: Plan, found: Found) -> Iterator[Piece]:
    """All of them. Whoever takes them one by one adds to `found` what came of each."""
    for name in planned.texts:
        for ctx in planned.ctx:
            yield Piece("texts", f"{name}-{ctx}", partial(likelihood.measure, name=name, ctx=ctx))
    yield Piece("spike", "one", spike.measure)
    yield Piece("facts", "full", retrieval.screen)
    able = retrieval.able(retrieval.summed(found["facts"]))
    for i in range(planned.haystacks):
        yield Piece("facts", str(i), partial(retrieval.measure, number=i, tasks=able))
    for i in range(planned.chats):
        yield Piece("chats", str(i), partial(chats.measure, number=i))


def _measure(
    recorder: Recorder[FidelityOptions], planned: Plan, journal: Journal[Finished], found: Found
) -> None:
    """What is not in the journal, into it and into `found`. The model is opened only where a piece is
    missing. Raises BadInputError and PsiKvError where it can't be measured."""
    done = {(one.part, one.name): one.result for one in journal.parts}
    with ExitStack() as stack:
        opened: tuple[Weights, Subject] | None = None
        for part, name, measure in pieces(planned, found):
            result = done.get((part, name))
            if result is None and part in (recorder.options.only or PARTS):
                # Distributions without the arithmetic's noise, the others with the model as users have it.
                which = planned.weights if part == "texts" else "file"
                if opened is None or opened[0] != which:
                    stack.close()
                    opened = which, stack.enter_context(_subject(recorder, planned, which, stack))
                measured = measure(opened[1], planned, lambda doing, of=part: recorder.say(f"{of}: {doing}"))
                result = msgspec.Raw(encoded(measured))
                journal.add(Finished(part=part, name=name, result=result))
            if result is not None:
                found[part] += decoded(result, _KINDS[part])


def _subject(recorder: Recorder[FidelityOptions], planned: Plan, which: Weights, stack: ExitStack) -> Subject:
    path = stack.enter_context(weights(recorder.model, which))
    threads = recorder.options.threads or cores()
    setup = Setup(
        variant="psi", model=str(path), auto=False, threads=threads, prefill_threads=threads,
        cache=recorder.options.cache,
    )  # fmt: skip
    return Subject(setup, planned.compared, planned.n_ctx)


def run(recorder: Recorder[FidelityOptions]) -> Report:
    """Ctrl-C keeps what is finished. Raises BadInputError for what can't be measured as asked."""
    config = GovernorConfig()
    planned = plan(recorder.options, config, quick=recorder.quick)
    found: Found = defaultdict(list)
    journal = recorder.journal(Finished, planned)
    interrupted = False
    try:
        _measure(recorder, planned, journal, found)
    except KeyboardInterrupt:
        interrupted = True
    full = [one for one in found["texts"] if one.policy == FULL]
    rows = Rows(
        plan=planned,
        likelihood=likelihood.summed(found["texts"], planned),
        answers=retrieval.summed(found["facts"] + found["chats"]),
        spikes=found["spike"],
        trims=len(found["texts"]) - len(full),
        differing_logits=sum(one.differing_logits for one in full),
    )
    report = recorder.report(
        list(targets.figures(rows, config.policy)),
        [recorder.options.threads or cores()],
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
