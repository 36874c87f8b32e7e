"""The policies that are compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from psi_kv_governor.policy import Policy, get_policy
from psi_kv_governor.policy.hybrid import Hybrid
from psi_kv_governor.policy.random import Random

FULL = "full"
"""The upper bound: nothing is given up. Not a policy, but it can be named among them."""
RANDOM = Random.name


@dataclass(frozen=True)
class WithRecall(Hybrid):
    """`hybrid`, and what a question or an answer looks for comes back."""

    name: ClassVar[str] = "recall"


RECALL = WithRecall.name


def contenders(names: Iterable[str], *, seed: int, seeds: int) -> list[Policy]:
    """The policies called `names`, each once, and always `random`, the lower bound, under `seeds` seeds.

    Raises BadInputError for a name that is unknown.
    """
    chosen = [name for name in dict.fromkeys(names) if name not in {FULL, RANDOM}]
    known = [WithRecall() if name == RECALL else get_policy(name) for name in chosen]
    return [*known, *(Random(seed=seed + i) for i in range(seeds))]
