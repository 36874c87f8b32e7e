"""transformers: caches whose memory can be given back, and the contract of an engine on top of them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psi_kv_governor.engines.transformers.cache import GovernedCache
    from psi_kv_governor.engines.transformers.engine import TransformersEngine
    from psi_kv_governor.engines.transformers.front import governed
    from psi_kv_governor.engines.transformers.kvpress import KvpressPolicy, as_press
    from psi_kv_governor.engines.transformers.stock import ParkedEnd

__all__ = ["GovernedCache", "KvpressPolicy", "ParkedEnd", "TransformersEngine", "as_press", "governed"]

_HOMES = {
    "GovernedCache": "cache",
    "TransformersEngine": "engine",
    "governed": "front",
    "KvpressPolicy": "kvpress",
    "as_press": "kvpress",
    "ParkedEnd": "stock",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when they are asked for: torch alone takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from psi_kv_governor.engines.transformers.versions import check_versions

    check_versions()  # says in one line what is missing
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
