"""Part 5: a greedy answer before, during and after a spike of pressure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from psi_kv_governor.policy import Policy
from psikv_bench.fidelity.likelihood import Tick
from psikv_bench.fidelity.plan import Plan
from psikv_bench.fidelity.results import Spike
from psikv_bench.fidelity.subject import Subject
from psikv_bench.fidelity.texts import read_text
from psikv_bench.model import Logits, differing


@dataclass(frozen=True)
class Answer:
    """What the model said, and the logits it chose from, shape (tokens, vocabulary)."""

    tokens: list[int]
    logits: Logits


def measure(subject: Subject, plan: Plan, tick: Tick) -> list[Spike]:
    """The first text is read once; then each policy (random under its first seed) goes through the spike."""
    name, ctx = plan.texts[0], plan.ctx[0]
    tick(f"{name}: reading to {ctx:,} tokens")
    *context, probe = (subject.opening + subject.tokens(read_text(name)))[: ctx + 1]
    subject.load(context)
    never = _answer(subject, probe, plan.spike_tokens)
    found = []
    for share in plan.shares:
        for one in plan.compared:
            tick(f"a spike: {one.name} gives up {share:.0%}")
            found.append(_spike(subject, plan, one.policies[0], share=share, probe=probe, never=never))
    return found


def _spike(subject: Subject, plan: Plan, policy: Policy, *, share: float, probe: int, never: Answer) -> Spike:
    mark = subject.mark()
    subject.trim(policy, subject.cells(share))
    under = _answer(subject, probe, plan.spike_tokens)
    # The prefix counts: what was said under pressure was decoded without a part of it, and is forgotten.
    subject.back_to(mark)
    subject.unmask()
    after = _answer(subject, probe, plan.spike_tokens)
    subject.back_to(mark)
    return Spike(
        text=plan.texts[0],
        policy=policy.name,
        share=share,
        same_under_pressure=agreeing(never.tokens, under.tokens),
        same_after_restore=agreeing(never.tokens, after.tokens),
        tokens=plan.spike_tokens,
        differing_logits=differing(never.logits, after.logits),
    )


def _answer(subject: Subject, probe: int, count: int) -> Answer:
    """The answer after `probe`, which is taken out of the context again."""
    mark, token = subject.mark(), probe
    tokens, rows = [], []
    for _ in range(count):
        rows.append(subject.logits([token])[-1])
        token = int(rows[-1].argmax())
        tokens.append(token)
    subject.back_to(mark)
    return Answer(tokens, np.stack(rows))


def agreeing(left: list[int], right: list[int]) -> int:
    """Tokens until the first that differs."""
    pairs = zip(left, right, strict=True)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), len(left))
