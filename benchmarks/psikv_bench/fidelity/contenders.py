"""The policies that are compared, each with the seeds under which it runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from psi_kv_governor.cache import Kind
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


@dataclass(frozen=True)
class Contender:
    """A policy by its name, once for each seed; one that draws nothing has one."""

    name: str
    policies: tuple[Policy, ...]


def contenders(names: Iterable[str], *, seed: int, seeds: int) -> list[Contender]:
    """The policies called `names`, each once, and always `random`, the lower bound, under `seeds` seeds.

    Raises BadInputError for a name that is unknown.
    """
    chosen = [name for name in dict.fromkeys(names) if name not in {FULL, RANDOM}]
    drawn = tuple(Random(seed=seed + i) for i in range(seeds))
    return [*(Contender(name, (_policy(name),)) for name in chosen), Contender(RANDOM, drawn)]


def _policy(name: str) -> Policy:
    return WithRecall() if name == RECALL else get_policy(name)


def needs(compared: Sequence[Contender]) -> frozenset[Kind]:
    """The evidence that all of them need together."""
    return frozenset(kind for one in compared for policy in one.policies for kind in policy.needs)
