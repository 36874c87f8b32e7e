"""Policies by name: those of the package, and those that other packages bring by entry point."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType

from psi_kv_governor._nearest import unknown
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.policy.attention import Attention
from psi_kv_governor.policy.base import Policy
from psi_kv_governor.policy.fifo import Fifo
from psi_kv_governor.policy.hybrid import Hybrid
from psi_kv_governor.policy.keydiff import KeyDiff
from psi_kv_governor.policy.keynorm import KeyNorm
from psi_kv_governor.policy.lru import Lru
from psi_kv_governor.policy.random import Random
from psi_kv_governor.policy.window import Window

ENTRY_POINTS = "psi_kv_governor.policies"
"""Group under which a package names its own policies: `name = "module:Class"`."""

POLICIES: Mapping[str, type[Policy]] = MappingProxyType(
    {policy.name: policy for policy in (Window, Fifo, Lru, Random, KeyNorm, KeyDiff, Attention, Hybrid)}
)
"""The policies of the package. A new one is one file, and one entry here."""


def get_policy(name: str) -> Policy:
    """The policy called `name`, with its defaults.

    Returns:
        An instance.

    Raises:
        BadInputError: Names the known ones, or says why a plug-in of that name can't be used.
    """
    if name in POLICIES:  # so that no plug-in is even looked at, unless it is asked for
        return POLICIES[name]()
    policies, broken = plug_ins()
    if name in broken:
        raise BadInputError(f"the policy {name} can't be used: {broken[name]}")
    if name not in policies:
        raise BadInputError(unknown("policy", name, [*POLICIES, *policies]))
    return policies[name]()


def all_policies() -> dict[str, type[Policy]]:
    """Every policy that can be used, the package's first."""
    return {**POLICIES, **plug_ins()[0]}


def about(policy: type[Policy]) -> str:
    """What it does, in one line: the first of its docstring."""
    return (inspect.getdoc(policy) or "").partition("\n")[0]


@functools.cache
def plug_ins() -> tuple[Mapping[str, type[Policy]], Mapping[str, str]]:
    """The policies of other packages by name, and those that can't be used with the reason, in one line.

    Somebody else's code: whatever it raises is its own failure, and stops nobody else's.

    Returns:
        Policies, and reasons, by the names of their entry points.
    """
    from importlib import metadata  # 1.7 MB with what it imports, for plug-ins alone

    policies: dict[str, type[Policy]] = {}
    broken: dict[str, str] = {}
    for point in metadata.entry_points(group=ENTRY_POINTS):
        try:
            policies[point.name] = _checked(point.name, point.load)
        except (Exception, SystemExit) as error:
            first = (str(error).splitlines() or [""])[0]
            why = first if isinstance(error, BadInputError) else f"{type(error).__name__}: {first}"
            broken[point.name] = f"{point.value} failed ({why})"
    return MappingProxyType(policies), MappingProxyType(broken)


def _checked(name: str, load: Callable[[], object]) -> type[Policy]:
    if name in POLICIES:
        raise BadInputError(f"{name} is a policy of the package: choose another name")
    policy = load()
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        raise BadInputError("it is no subclass of psi_kv_governor.policy.Policy")
    policy()  # abstract, or without defaults: better found out now than under pressure
    if policy.name != name:
        raise BadInputError(f"its class calls itself {policy.name}")
    return policy
