"""The words that all engines share. It knows no engine."""

from psi_kv_governor.cache.engine import Engine
from psi_kv_governor.cache.evidence import Evidence, Kind, Values
from psi_kv_governor.cache.plan import Plan, Result, Step, Verb
from psi_kv_governor.cache.ranges import Range, cells_in, merged, without
from psi_kv_governor.cache.recall import Recall, Recalled, RecallMode
from psi_kv_governor.cache.serial import OneAtATime
from psi_kv_governor.cache.snapshot import (
    BlobState,
    CacheState,
    Capabilities,
    Capability,
    Description,
    Domain,
    SequenceState,
    Snapshot,
)

__all__ = [
    "BlobState",
    "CacheState",
    "Capabilities",
    "Capability",
    "Description",
    "Domain",
    "Engine",
    "Evidence",
    "Kind",
    "OneAtATime",
    "Plan",
    "Range",
    "Recall",
    "RecallMode",
    "Recalled",
    "Result",
    "SequenceState",
    "Snapshot",
    "Step",
    "Values",
    "Verb",
    "cells_in",
    "merged",
    "without",
]
