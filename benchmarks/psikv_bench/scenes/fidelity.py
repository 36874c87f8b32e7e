"""What the model still knows when a policy gave up a part of its context, against the full cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import msgspec

from psi_kv_governor.config import GovernorConfig
from psikv_bench.fidelity import chats, likelihood, plots, retrieval, spike, tables, targets
from psikv_bench.fidelity.contenders import FULL
from psikv_bench.fidelity.plan import PARTS, FidelityOptions, Part, Plan, plan
from psikv_bench.fidelity.results import Rows, Spike
from psikv_bench.fidelity.subject import Subject
from psikv_bench.fidelity.weights import Weights, weights
from psikv_bench.journal import Journal, decoded, encoded
from psikv_bench.machine import cores
from psikv_bench.messages import Setup
from psikv_bench.record import Recorder, Report
from psikv_bench.scene import Scene

_KINDS: dict[Part, Any] = {
    "texts": list[likelihood.Run],
    "spike": list[Spike],
    "facts": list[retrieval.Outcome],
    "chats": list[retrieval.Outcome],
}
"""What a piece of each part finds: what JSON can hold, and arrays of float64."""


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


def _found(journal: Journal[Finished]) -> dict[Part, list[Any]]:
    found: dict[Part, list[Any]] = defaultdict(list)
    for one in journal.parts:
        found[one.part] += decoded(one.result, _KINDS[one.part])
    return found


def _pieces(planned: Plan, journal: Journal[Finished]) -> Iterator[Piece]:
    """All of them, each when those before it are in the journal."""
    for name in planned.texts:
        for ctx in planned.ctx:
            yield Piece("texts", f"{name}-{ctx}", partial(likelihood.measure, name=name, ctx=ctx))
    yield Piece("spike", "one", spike.measure)
    yield Piece("facts", "full", retrieval.screen)
    able = retrieval.able(retrieval.summed(_found(journal)["facts"]))
    for i in range(planned.haystacks):
        yield Piece("facts", str(i), partial(retrieval.measure, number=i, tasks=able))
    for i in range(planned.chats):
        yield Piece("chats", str(i), partial(chats.measure, number=i))


def _measure(recorder: Recorder[FidelityOptions], planned: Plan, journal: Journal[Finished]) -> None:
    """What is asked for and not in the journal. The model is opened only where a piece is missing.

    Raises BadInputError and PsiKvError where it can't be measured.
    """
    parts, done = recorder.options.only or PARTS, {(one.part, one.name) for one in journal.parts}
    opened: dict[Weights, Subject] = {}
    with ExitStack() as stack:

        def finished(piece: Piece) -> Finished:
            # Distributions without the arithmetic's noise, the others with the model as users have it.
            which = planned.weights if piece.part == "texts" else "file"
            if which not in opened:
                stack.close()
                opened.clear()
                opened[which] = stack.enter_context(_subject(recorder, planned, which, stack))
            found = piece.measure(
                opened[which], planned, lambda doing: recorder.say(f"{piece.part}: {doing}")
            )
            return Finished(part=piece.part, name=piece.name, result=msgspec.Raw(encoded(found)))

        pieces = _pieces(planned, journal)
        ahead = (one for one in pieces if one.part in parts and (one.part, one.name) not in done)
        journal.play(ahead, finished)


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
    journal: Journal[Finished] = recorder.journal(Finished, planned)
    _measure(recorder, planned, journal)
    found = _found(journal)
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
        interrupted=journal.interrupted,
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
