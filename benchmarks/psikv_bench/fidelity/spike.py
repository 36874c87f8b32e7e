"""Part 5: a greedy answer before, during and after a spike of pressure, over the disk store."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from psikv_bench.fidelity.likelihood import Tick
from psikv_bench.fidelity.metrics import Logits
from psikv_bench.fidelity.plan import Plan
from psikv_bench.fidelity.results import Spike
from psikv_bench.fidelity.subject import Subject
from psikv_bench.fidelity.texts import read_text
from psi_kv_governor.bench.twins import differing

from psi_kv_governor.config import load_config
from psi_kv_governor.policy import Policy
from psi_kv_governor.store import Store, open_store


@dataclass(frozen=True)
class Answer:
    """What the model said, and the logits it chose from, shape (tokens, vocabulary)."""

    tokens: list[int]
    logits: Logits


def steps(plan: Plan) -> int:
    """How often `measure` ticks."""
    return 1 + len(plan.shares) * len(plan.compared)


def measure(subject: Subject, plan: Plan, tick: Tick) -> list[Spike]:
    """The first text is read once; then each policy (random under its first seed) goes through the spike."""
    name, ctx = plan.texts[0], plan.ctx[0]
    store = open_store(load_config(None, {}, store="disk"))
    assert store is not None, "a disk store was asked for"
    try:
        tick(f"{name}: reading to {ctx:,} tokens")
        *context, probe = (subject.opening + subject.tokens(read_text(name)))[: ctx + 1]
        subject.load(context)
        never = _answer(subject, probe, plan.spike_tokens)
        found = []
        for share in plan.shares:
            for one in plan.compared:
                tick(f"a spike: {one.name} gives up {share:.0%} to the disk")
                policy = one.policies[0]
                found.append(
                    _spike(subject, plan, policy, share=share, probe=probe, never=never, store=store)
                )
        return found
    finally:
        store.close()


def _spike(
    subject: Subject, plan: Plan, policy: Policy, *, share: float, probe: int, never: Answer, store: Store
) -> Spike:
    mark = subject.mark()
    subject.trim(policy, subject.cells(share), store)
    under = _answer(subject, probe, plan.spike_tokens)
    # The prefix counts: what was said under pressure was decoded without a part of it, and is forgotten.
    subject.back_to(mark)
    subject.restore()
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
