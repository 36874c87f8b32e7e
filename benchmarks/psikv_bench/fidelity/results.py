"""What the benchmark found, as it is kept in JSON."""

from __future__ import annotations

from typing import Literal

import msgspec

from psikv_bench.fidelity.plan import Plan
from psikv_bench.intervals import Interval, Share

When = Literal["known", "later"]
SCENES: dict[When, str] = {"known": "question known", "later": "asked after"}
"""Whether the question was in the context before cells were given up (as in SnapKV), or came after."""


class Likelihood(msgspec.Struct, frozen=True, kw_only=True):
    """How one policy goes on with one text, or with all of them together."""

    text: str
    """Empty for all texts."""
    policy: str
    share: float
    """Of the context that was given up."""
    kl: Interval
    """Kullback-Leibler divergence from the full cache's next-token distribution, nats a token."""
    top1: Interval
    """Share of the tokens where both caches think the same one most probable."""
    perplexity: float
    """Of the tokens that do come next."""
    perplexity_ratio: Interval
    """The same over the full cache's, token by token: what differs between texts is not in its interval."""


class Answers(msgspec.Struct, frozen=True, kw_only=True):
    """How many questions of one kind a policy still answers, or the full cache."""

    task: str
    when: When
    policy: str
    share: float
    right: Share


class Spike(msgspec.Struct, frozen=True, kw_only=True):
    """A greedy answer before, during and after a spike of pressure."""

    policy: str
    share: float
    same_under_pressure: int
    """Tokens until the first that differs from the never-trimmed answer."""
    same_after_restore: int
    tokens: int
    """Of the answer."""
    differing_logits: int
    """After restoring, against never trimmed: bits count."""


class Rows(msgspec.Struct, frozen=True, kw_only=True):
    """All that was found, as numbers."""

    plan: Plan
    likelihood: list[Likelihood]
    answers: list[Answers]
    spikes: list[Spike]
    trims: int
    """Each with its restore, after which the full cache's logits were the same bits as before."""
    differing_logits: int
    """Logits of the full cache that were not: 0."""
