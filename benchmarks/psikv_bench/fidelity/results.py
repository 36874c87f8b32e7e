"""What the benchmark found, as it is kept in JSON."""

from __future__ import annotations

from typing import Literal

import msgspec

from psikv_bench.fidelity.weights import Weights
from psikv_bench.intervals import Interval, Share
from psikv_bench.record import Header

When = Literal["known", "later"]
"""Whether the question was in the context before cells were given up (as in SnapKV), or came after."""


class TextUsed(msgspec.Struct, frozen=True, kw_only=True):
    """One text that was read."""

    name: str
    about: str
    fingerprint: str
    """Of the text: another Python brings another version."""


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """All that the figures depend on beside the machine and the model."""

    policies: list[str]
    default_policy: str
    shares: list[float]
    """Given up, of all cells of the context."""
    ctx: list[int]
    """Tokens of the context when cells are given up."""
    texts: list[TextUsed]
    continuation: int
    """Tokens that follow, and over which distributions are compared."""
    seed: int
    random_seeds: int
    cache: str
    """Type of the cells."""
    weights: Weights
    """Of the model for the likelihoods: "f32" is without the noise of quantised arithmetic."""
    sink_cells: int
    window_cells: int
    block_cells: int


class Likelihood(msgspec.Struct, frozen=True, kw_only=True):
    """How one policy goes on with one text, or with all of them together."""

    text: str
    """Empty for all texts."""
    ctx: int
    """0 for all lengths of context."""
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


class Gradual(msgspec.Struct, frozen=True, kw_only=True):
    """The same share given up at once and in five steps, with tokens decoded in between."""

    policy: str
    share: float
    at_once: Interval
    """Divergence from the full cache, nats a token, when all goes right before the continuation."""
    in_steps: Interval
    """The same when a fifth goes at a time."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of question, and whether this model can answer it at all."""

    name: str
    about: str
    full: Share
    """Right with the full cache: the upper bound."""
    able: bool
    """False: beyond this model, and so not asked of a trimmed cache."""


class Retrieval(msgspec.Struct, frozen=True, kw_only=True):
    """How many questions of one kind a policy still answers."""

    task: str
    when: When
    policy: str
    share: float
    all: Share
    by_depth: dict[str, Share]
    """The same by the third of the text in which the fact is."""


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """A chat in which the governor gave up cells between the turns."""

    policy: str
    share: float
    given_up: float
    """Share of the context that was away at the end, mean over the chats."""
    trims: float
    """Trims of the governor in a chat, mean."""
    right: Share


class Spike(msgspec.Struct, frozen=True, kw_only=True):
    """A greedy answer before, during and after a spike of pressure."""

    text: str
    policy: str
    share: float
    same_under_pressure: int
    """Tokens until the first that differs from the never-trimmed answer."""
    same_after_restore: int
    tokens: int
    """Of the answer."""
    differing_logits: int
    """After restoring, against never trimmed: bits count."""


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """Decoding after half was given up against the full cache, by turns."""

    policy: str
    ctx: int
    full_s: list[float]
    """Of each turn, seconds a token."""
    trimmed_s: list[float]


class Rows(msgspec.Struct, frozen=True, kw_only=True):
    """All that was found, as numbers."""

    setting: Setting
    added: dict[str, Header] = {}
    """By part: the later runs (`--only`) that measured it anew, where it is not from the first."""
    likelihood: list[Likelihood] = []
    noise: Likelihood | None = None
    """With the weights as the file has them: one cell given up, first text and length."""
    gradual: list[Gradual] = []
    tasks: list[Task] = []
    retrieval: list[Retrieval] = []
    conversation: list[Conversation] = []
    spikes: list[Spike] = []
    speed: Speed | None = None
    trims_between_exact: int = 0
    """Trims, each with its restore, after which the full cache's logits were the same bits as before."""
    differing_logits: int = 0
    """Logits of the full cache that were not: 0."""
