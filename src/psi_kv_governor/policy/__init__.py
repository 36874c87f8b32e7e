"""Which blocks of tokens to give up: the policies, and the selection by their scores."""

from __future__ import annotations

from psi_kv_governor.cache import Evidence, Kind, Range, Values
from psi_kv_governor.policy.base import Policy
from psi_kv_governor.policy.registry import POLICIES, all_policies, get_policy
from psi_kv_governor.policy.select import select, trimmable

__all__ = [
    "POLICIES",
    "Evidence",
    "Kind",
    "Policy",
    "Range",
    "Values",
    "all_policies",
    "get_policy",
    "select",
    "trimmable",
]
