"""Decode speed after half was given up, by turns with the full cache."""

from __future__ import annotations

import time

from psi_kv_governor.policy import Policy, get_policy
from psikv_bench.fidelity.likelihood import Tick
from psikv_bench.fidelity.plan import Plan
from psikv_bench.fidelity.results import Speed
from psikv_bench.fidelity.subject import Subject
from psikv_bench.fidelity.texts import read_text

SHARE = 0.5
_TURN_TOKENS = 8
_SETTLE_S = 0.05
"""libgomp's idle threads spin for about 8 ms; after this none does."""


def measure(subject: Subject, plan: Plan, tick: Tick) -> Speed:
    """Every second turn the other way round, so that a drift of the machine falls on both."""
    name, ctx = plan.texts[0], _length(subject, plan)
    policy = get_policy(subject.config.policy)
    tick(f"{name}: reading to {ctx:,} tokens")
    subject.load((subject.opening + subject.tokens(read_text(name)))[:ctx])
    full, trimmed = [], []
    _turn(subject)  # warm up, not counted
    for number in range(plan.speed_turns):
        tick(f"decode speed: turn {number + 1} of {plan.speed_turns}")
        if number % 2:
            trimmed.append(_without_half(subject, policy))
            full.append(_turn(subject))
        else:
            full.append(_turn(subject))
            trimmed.append(_without_half(subject, policy))
    return Speed(policy=policy.name, ctx=ctx, full_s=full, trimmed_s=trimmed)


def _length(subject: Subject, plan: Plan) -> int:
    """The longest context that the text fills: the longer it is, the more there is to win."""
    available = len(subject.tokens(read_text(plan.texts[0])))
    return max(length for length in plan.ctx if length <= available or length == plan.ctx[0])


def _without_half(subject: Subject, policy: Policy) -> float:
    with subject.trimmed(policy, SHARE):
        return _turn(subject)


def _turn(subject: Subject) -> float:
    """Seconds a token."""
    mark = subject.mark()
    time.sleep(_SETTLE_S)
    began_s = time.perf_counter()
    subject.greedy(0, _TURN_TOKENS)
    seconds = time.perf_counter() - began_s
    subject.back_to(mark)
    return seconds / _TURN_TOKENS
