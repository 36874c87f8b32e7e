"""Parts 1 and 2: how a trimmed cache goes on with a text, against the full one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np

from psi_kv_governor.errors import BadInputError
from psi_kv_governor.policy import Range
from psikv_bench.fidelity.contenders import FULL
from psikv_bench.fidelity.metrics import Compared, Reference
from psikv_bench.fidelity.plan import Plan
from psikv_bench.fidelity.results import Likelihood
from psikv_bench.fidelity.subject import Subject
from psikv_bench.intervals import Interval, mean_of
from psikv_bench.model import differing

ONE_CELL = "one cell"
"""The control in the place of a policy: a single cell is given up, in the middle of the context. What is left
of a difference then is the arithmetic's own noise."""

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
    differing_logits: int = 0
    """Of the full cache: those that are not the same bits after all that was taken from it and put back."""


def measure(subject: Subject, plan: Plan, tick: Tick, *, name: str, ctx: int) -> list[Run]:
    """Read the text called `name` to `ctx` tokens, and let each policy give up each share.

    Nothing is measured where the text is too short. Raises BadInputError when it is so for the least length.
    """
    tokens = subject.text(name)
    if len(tokens) <= ctx + plan.continuation:
        if ctx > plan.ctx[0]:
            return []
        raise BadInputError(f"the text {name!r} has {len(tokens)} tokens, too few for a context of {ctx}")
    tick(f"{name}: reading to {ctx:,} tokens")
    subject.load(tokens[:ctx])
    *following, last = tokens[ctx : ctx + plan.continuation + 1]
    mark = subject.mark()
    full = subject.logits(following)
    reference = Reference(full, [*following[1:], last])
    subject.back_to(mark)
    subject.mask([Range(ctx // 2, ctx // 2 + 1)])
    runs = [Run(name, ctx, ONE_CELL, 0.0, reference.compare(subject.logits(following)))]
    subject.back_to(mark)
    subject.unmask()
    for share, policy in product(plan.shares, plan.compared):
        tick(f"{name}, {ctx:,} tokens: {policy.name} gives up {share:.0%}")
        with subject.trimmed(policy, share):
            seen = reference.compare(subject.logits(following))
        runs.append(Run(name, ctx, policy.name, share, seen))
    differ = differing(full, subject.logits(following))
    subject.back_to(mark)
    return [Run(name, ctx, FULL, 0.0, reference.compare(full), differ), *runs]


def summed(runs: list[Run], plan: Plan) -> list[Likelihood]:
    """Over all and by text; the seeds of a policy count as one."""
    full_nll = {(run.text, run.ctx): run.seen.nll for run in runs if run.policy == FULL}
    table = []
    for policy, share in dict.fromkeys((run.policy, run.share) for run in runs):
        mine = [run for run in runs if (run.policy, run.share) == (policy, share)]
        for text in ("", *plan.texts):
            group = [run for run in mine if text in {"", run.text}]
            if not group:
                continue
            nll = np.concatenate([run.seen.nll for run in group])
            more = mean_of([run.seen.nll - full_nll[run.text, run.ctx] for run in group], plan.seed)
            line = Likelihood(
                text=text,
                policy=policy,
                share=share,
                kl=mean_of([run.seen.kl for run in group], plan.seed),
                top1=mean_of([run.seen.top1 for run in group], plan.seed),
                perplexity=math.exp(nll.mean()),
                perplexity_ratio=Interval(math.exp(more.mean), math.exp(more.low), math.exp(more.high)),
            )
            table.append(line)
    return table
