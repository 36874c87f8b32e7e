"""What the tests of contexts that are made anew share, on the CPU and on a device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from psi_kv_governor import GovernedLlama
from psi_kv_governor.cache import CacheState, Plan, Range, Result, Step, Verb


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGESIZE")


def cache_of(llm: GovernedLlama) -> CacheState:
    (cache,) = llm.governor.engine.snapshot().caches
    return cache


def apply(llm: GovernedLlama, verb: Verb, *ranges: tuple[int, int]) -> Result:
    parts = tuple(Range(*part) for part in ranges)
    sequence = None if verb is Verb.RELEASE else 0
    step = Step(verb=verb, cache=cache_of(llm).id, sequence=sequence, ranges=parts)
    return llm.governor.engine.apply(Plan(steps=(step,)))


def cells(llm: GovernedLlama) -> int:
    """What the context has now."""
    return llm._ctx.resizer.cells


def next_logits(llm: Any, token: int) -> np.ndarray:
    """The logits after one more token, which is taken back."""
    llm.eval([token])
    logits = np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).copy()
    llm.n_tokens -= 1
    return logits
