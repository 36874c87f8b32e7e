"""Parts 1, 2 and 6: how a trimmed cache goes on with a text, against the full one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from psi_kv_governor.errors import BadInputError
from psi_kv_governor.policy import Policy
from psikv_bench.fidelity.contenders import FULL
from psikv_bench.fidelity.metrics import Compared, PerToken, Reference
from psikv_bench.fidelity.plan import Plan
from psikv_bench.fidelity.results import Gradual, Likelihood
from psikv_bench.fidelity.subject import Subject
from psikv_bench.fidelity.texts import read_text
from psikv_bench.intervals import Interval, mean_of
from psikv_bench.model import Logits, differing

ONE_CELL = "one cell"
"""The control in the place of a policy: a single cell is given up, in the middle of the context."""
STEPS = 5
"""Of a gradual trim."""
BETWEEN_TOKENS = 32
"""Decoded after each step: a second or two of an answer on a small machine."""

Tick = Callable[[str], None]
"""Hears what comes next."""


@dataclass(frozen=True)
class Run:
    """One continuation under one policy and seed."""

    text: str
    ctx: int
    policy: str
    share: float
    seen: Compared


@dataclass(frozen=True)
class Measured:
    """All policies on one text at one length; and whether the full cache still gives the same bits after all
    that was taken from it and put back."""

    runs: list[Run] = field(default_factory=list)
    trims: int = 0
    differing_logits: int = 0


def measure(subject: Subject, plan: Plan, name: str, ctx: int, tick: Tick) -> Measured:
    """Read the text called `name` to `ctx` tokens, and let each policy give up each share.

    Nothing is measured where the text is too short. Raises BadInputError when it is so for the least length.
    """
    tokens = subject.opening + subject.tokens(read_text(name))
    if len(tokens) <= ctx + plan.continuation:
        if ctx > plan.ctx[0]:
            return Measured()
        raise BadInputError(f"the text {name!r} has {len(tokens)} tokens, too few for a context of {ctx}")
    tick(f"{name}: reading to {ctx:,} tokens")
    following, full, reference = _read(subject, plan, tokens, ctx)
    mark = subject.mark()
    runs = [
        Run(name, ctx, FULL, 0.0, reference.compare(full)),
        _control(subject, name, following, reference),
    ]
    for share in plan.shares:
        for policy in policies(plan):
            tick(f"{name}, {ctx:,} tokens: {policy.name} gives up {share:.0%}")
            with subject.trimmed(policy, share):
                seen = reference.compare(subject.logits(following[:-1]))
            runs.append(Run(name, ctx, policy.name, share, seen))
    differ = differing(full, subject.logits(following[:-1]))
    subject.back_to(mark)
    return Measured(runs, trims=len(runs) - 1, differing_logits=differ)


def _control(subject: Subject, name: str, following: list[int], reference: Reference) -> Run:
    """What is left of a difference when next to nothing is given up: the arithmetic's own noise."""
    ctx, mark = subject.n_tokens, subject.mark()
    subject.trim_cell(ctx // 2)
    seen = reference.compare(subject.logits(following[:-1]))
    subject.back_to(mark)
    subject.unmask()
    return Run(name, ctx, ONE_CELL, 0.0, seen)


def _read(subject: Subject, plan: Plan, tokens: list[int], ctx: int) -> tuple[list[int], Logits, Reference]:
    """Read `ctx` of `tokens`; gives what follows, with the full cache's logits and distributions on it."""
    subject.load(tokens[:ctx])
    following, mark = tokens[ctx : ctx + plan.continuation + 1], subject.mark()
    full = subject.logits(following[:-1])
    subject.back_to(mark)
    return following, full, Reference(full, following[1:])


def control(subject: Subject, plan: Plan, tick: Tick) -> Likelihood:
    """The control alone, on the first text."""
    name, ctx = plan.texts[0], plan.ctx[0]
    tick(f"{name}: reading to {ctx:,} tokens")
    tokens = subject.opening + subject.tokens(read_text(name))
    following, full, reference = _read(subject, plan, tokens, ctx)
    run = _control(subject, name, following, reference)
    return line([run], {(name, ctx): reference.compare(full)}, plan.seed, text=name, ctx=ctx)


def policies(plan: Plan) -> Iterator[Policy]:
    """Every contender under each of its seeds."""
    for one in plan.compared:
        yield from one.policies


# -- summing up --------------------------------------------------------------------------------------------


def summed(runs: list[Run], plan: Plan) -> list[Likelihood]:
    """Over all, by text, and by length; the seeds of a policy count as one."""
    table: list[Likelihood] = []
    full = {(run.text, run.ctx): run.seen for run in runs if run.policy == FULL}
    groups = [("", 0), *((text, 0) for text in plan.texts), *(("", ctx) for ctx in plan.ctx)]
    for policy, share in _cases(plan):
        mine = [run for run in runs if (run.policy, run.share) == (policy, share)]
        for text, ctx in groups:
            group = [run for run in mine if text in {"", run.text} and ctx in {0, run.ctx}]
            if group:
                table.append(line(group, full, plan.seed, text=text, ctx=ctx))
    return table


def _cases(plan: Plan) -> Iterator[tuple[str, float]]:
    yield FULL, 0.0
    yield ONE_CELL, 0.0
    for share in plan.shares:
        for name in plan.names:
            yield name, share


def line(
    group: list[Run], full: Mapping[tuple[str, int], Compared], seed: int, *, text: str = "", ctx: int = 0
) -> Likelihood:
    """One line of the table for runs of one policy; `full` is the full cache's by text and length."""
    nll = np.concatenate([run.seen.nll for run in group])
    more = mean_of([run.seen.nll - full[run.text, run.ctx].nll for run in group], seed)
    return Likelihood(
        text=text,
        ctx=ctx,
        policy=group[0].policy,
        share=group[0].share,
        kl=mean_of([run.seen.kl for run in group], seed),
        top1=mean_of([run.seen.top1 for run in group], seed),
        perplexity=math.exp(nll.mean()),
        perplexity_ratio=Interval(math.exp(more.mean), math.exp(more.low), math.exp(more.high)),
    )


# -- in steps ----------------------------------------------------------------------------------------------


Steps = tuple[str, PerToken, PerToken]
"""(policy, at once, in steps): divergence in nats a token, shape (tokens,)."""


def measure_gradual(subject: Subject, plan: Plan, name: str, tick: Tick) -> list[Steps]:
    """Five trims with tokens in between against one at their end.

    The same tokens are read in the same order, the same number of cells is given up in all.
    """
    share, start = plan.shares[-1], plan.ctx[0] - STEPS * BETWEEN_TOKENS
    tokens = subject.opening + subject.tokens(read_text(name))
    tick(f"{name}: reading to {start:,} tokens")
    subject.forget()  # not with `load`: what was sampled later is not to be known here
    subject.read(tokens[:start])
    mark = subject.mark()
    between, following = tokens[start : plan.ctx[0]], tokens[plan.ctx[0] :][: plan.continuation + 1]
    subject.read(between)
    whole = subject.mark()
    reference = Reference(subject.logits(following[:-1]), following[1:])
    subject.back_to(whole)
    cells = subject.cells(share)
    at_once = {}
    for policy in policies(plan):
        with subject.trimmed(policy, share):
            at_once[policy] = reference.compare(subject.logits(following[:-1])).kl
    found = []
    for policy in policies(plan):
        subject.back_to(mark)
        tick(f"{name}: {policy.name} gives up {share:.0%} in {STEPS} steps")
        for goal, part in zip(_goals(cells, subject.config.block_cells), _fifths(between), strict=True):
            subject.trim(policy, goal)
            subject.read(part)
        in_steps = reference.compare(subject.logits(following[:-1])).kl
        subject.back_to(mark)
        subject.unmask()
        found.append((policy.name, at_once[policy], in_steps))
    return found


def _goals(cells: int, block_cells: int) -> list[int]:
    """`cells` in five steps of whole blocks."""
    done = [round(cells * (i + 1) / STEPS / block_cells) * block_cells for i in range(STEPS)]
    return [after - before for before, after in zip([0, *done], done, strict=False)]


def _fifths(tokens: list[int]) -> Iterator[list[int]]:
    for i in range(STEPS):
        yield tokens[i * BETWEEN_TOKENS : (i + 1) * BETWEEN_TOKENS]


def summed_gradual(kept: Sequence[Steps], plan: Plan) -> list[Gradual]:
    """One line a policy, over texts and seeds."""
    lines = []
    for name in plan.names:
        mine = [(at_once, in_steps) for policy, at_once, in_steps in kept if policy == name]
        if mine:
            at_once, in_steps = (mean_of([np.asarray(one[i]) for one in mine], plan.seed) for i in (0, 1))
            lines.append(Gradual(policy=name, share=plan.shares[-1], at_once=at_once, in_steps=in_steps))
    return lines
