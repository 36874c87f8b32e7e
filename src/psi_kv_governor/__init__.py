"""PSI KV Governor: the KV cache gives its memory back under pressure, and puts the context back bit for bit.

Importing this package imports no engine: `GovernedLlama` loads llama.cpp when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psi_kv_governor.config import GovernorConfig, load_config
    from psi_kv_governor.governor import Governor
    from psi_kv_governor.limits import psi_set_cache_limit
    from psi_kv_governor.llama import GovernedLlama
    from psi_kv_governor.status import Status

_HOME = {
    "GovernedLlama": "psi_kv_governor.llama",
    "Governor": "psi_kv_governor.governor",
    "GovernorConfig": "psi_kv_governor.config",
    "Status": "psi_kv_governor.status",
    "load_config": "psi_kv_governor.config",
    "psi_set_cache_limit": "psi_kv_governor.limits",
}

__all__ = ["GovernedLlama", "Governor", "GovernorConfig", "Status", "load_config", "psi_set_cache_limit"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
