"""Part 5: a greedy answer before, during and after a spike of pressure."""

from __future__ import annotations

from itertools import product

from psikv_bench.fidelity.likelihood import Tick
from psikv_bench.fidelity.metrics import agreeing
from psikv_bench.fidelity.plan import Plan
from psikv_bench.fidelity.results import Spike
from psikv_bench.fidelity.subject import Subject
from psikv_bench.model import Logits, differing


def measure(subject: Subject, plan: Plan, tick: Tick) -> list[Spike]:
    """The first text is read once; then each policy (random under its first seed) goes through the spike."""
    name, ctx = plan.texts[0], plan.ctx[0]
    tick(f"{name}: reading to {ctx:,} tokens")
    *context, probe = subject.text(name)[: ctx + 1]
    subject.load(context)

    def answer() -> Logits:
        mark = subject.mark()
        logits = subject.greedy(probe, plan.spike_tokens)
        subject.back_to(mark)
        return logits

    never = answer()
    tokens = list(never.argmax(axis=-1))
    found = []
    for share, policy in product(plan.shares, plan.compared[: len(plan.policies)]):
        tick(f"a spike: {policy.name} gives up {share:.0%}")
        with subject.trimmed(policy, share):
            under = answer()
        # The prefix counts: what was said under pressure was decoded without a part of it, and is forgotten.
        after = answer()
        line = Spike(
            policy=policy.name,
            share=share,
            same_under_pressure=agreeing(tokens, list(under.argmax(axis=-1))),
            same_after_restore=agreeing(tokens, list(after.argmax(axis=-1))),
            tokens=plan.spike_tokens,
            differing_logits=differing(never, after),
        )
        found.append(line)
    return found
