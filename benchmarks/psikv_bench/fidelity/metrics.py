"""What one continuation shows: next-token distributions of a trimmed cache against those of the full one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from psikv_bench.model import Logits

PerToken = npt.NDArray[np.float64]
"""One value a token of the continuation, shape (tokens,)."""


def log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """Logarithm of the softmax of each row, in double precision: a KL divergence of 0.001 is a difference of
    nearly equal logarithms."""
    shifted: npt.NDArray[np.float64] = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


@dataclass(frozen=True)
class Compared:
    """The continuation under a trimmed cache, token by token."""

    kl: PerToken
    """Kullback-Leibler divergence of the trimmed cache's distribution from the full cache's, in nats."""
    top1: PerToken
    """1 where both caches think the same next token most probable, else 0."""
    nll: PerToken
    """Negative log likelihood of the token that does come next, in nats."""


class Reference:
    """The full cache's distributions over one continuation, to compare others with.

    `targets` are the tokens that do come next, one for each row of `logits`.
    """

    def __init__(self, logits: Logits, targets: list[int]) -> None:
        self._targets = targets
        self._log_p = log_softmax(logits)
        self._p = np.exp(self._log_p)
        self._best = logits.argmax(axis=-1)

    def compare(self, logits: Logits) -> Compared:
        """`logits`, shape as the reference's, against it."""
        log_q = log_softmax(logits)
        return Compared(
            # Never below 0 but by rounding.
            kl=np.maximum(np.einsum("tv,tv->t", self._p, self._log_p - log_q), 0.0),
            top1=(logits.argmax(axis=-1) == self._best).astype(np.float64),
            nll=-log_q[np.arange(len(self._targets)), self._targets],
        )


def agreeing(left: Sequence[int], right: Sequence[int]) -> int:
    """Tokens until the first that differs."""
    pairs = list(zip(left, right, strict=False))
    return next((i for i, (one, other) in enumerate(pairs) if one != other), len(pairs))
