"""PSI KV Governor: the KV cache gives its memory back under pressure, and puts the context back bit for bit.

What `__all__` names here, and in the rooms `cache`, `policy`, `pressure` and `engines` for those who write an
engine, a policy or a source of pressure, is public and changes by semantic versioning only. Everything else
is internal. Importing this package imports no engine: `GovernedLlama` loads llama.cpp when it is first asked
for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psi_kv_governor.cache import Engine
    from psi_kv_governor.config import GovernorConfig, load_config
    from psi_kv_governor.errors import BadInputError, EngineError, PsiKvError, SourceLostError
    from psi_kv_governor.events import (
        AnsweredMasked,
        CacheClosed,
        CacheOpened,
        Degraded,
        Event,
        JsonLinesSink,
        ModeChanged,
        Recomputed,
        Released,
        Restored,
        SourceChanged,
        Trimmed,
    )
    from psi_kv_governor.governor import Governor
    from psi_kv_governor.limits import psi_set_cache_limit
    from psi_kv_governor.llama import GovernedLlama
    from psi_kv_governor.policy import Policy
    from psi_kv_governor.pressure import PressureSource
    from psi_kv_governor.status import Status

_HOME = {
    "BadInputError": "psi_kv_governor.errors",
    "AnsweredMasked": "psi_kv_governor.events",
    "CacheClosed": "psi_kv_governor.events",
    "CacheOpened": "psi_kv_governor.events",
    "Degraded": "psi_kv_governor.events",
    "Engine": "psi_kv_governor.cache",
    "EngineError": "psi_kv_governor.errors",
    "Event": "psi_kv_governor.events",
    "GovernedLlama": "psi_kv_governor.llama",
    "Governor": "psi_kv_governor.governor",
    "GovernorConfig": "psi_kv_governor.config",
    "JsonLinesSink": "psi_kv_governor.events",
    "ModeChanged": "psi_kv_governor.events",
    "Policy": "psi_kv_governor.policy",
    "PressureSource": "psi_kv_governor.pressure",
    "PsiKvError": "psi_kv_governor.errors",
    "Recomputed": "psi_kv_governor.events",
    "Released": "psi_kv_governor.events",
    "Restored": "psi_kv_governor.events",
    "SourceChanged": "psi_kv_governor.events",
    "SourceLostError": "psi_kv_governor.errors",
    "Status": "psi_kv_governor.status",
    "Trimmed": "psi_kv_governor.events",
    "load_config": "psi_kv_governor.config",
    "psi_set_cache_limit": "psi_kv_governor.limits",
}

__all__ = [
    "AnsweredMasked",
    "BadInputError",
    "CacheClosed",
    "CacheOpened",
    "Degraded",
    "Engine",
    "EngineError",
    "Event",
    "GovernedLlama",
    "Governor",
    "GovernorConfig",
    "JsonLinesSink",
    "ModeChanged",
    "Policy",
    "PressureSource",
    "PsiKvError",
    "Recomputed",
    "Released",
    "Restored",
    "SourceChanged",
    "SourceLostError",
    "Status",
    "Trimmed",
    "load_config",
    "psi_set_cache_limit",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
