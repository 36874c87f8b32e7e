"""Where spilled ranges wait: on disk, or nowhere."""

from __future__ import annotations

from pathlib import Path

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.store.base import BlobTag, Store
from psi_kv_governor.store.disk import DiskStore

__all__ = ["BlobTag", "DiskStore", "Store", "open_store"]


def open_store(config: GovernorConfig) -> Store | None:
    """The store that `config` asks for; None for "none": what is given up is then evicted.

    Raises BadInputError when `config.store_dir` cannot be used, and StoreError when no folder was named
    and the default one cannot be used.
    """
    if config.store == "none":
        return None
    directory = Path(config.store_dir) if config.store_dir else None
    return DiskStore(directory, config.store_limit_bytes, config.store_reserve_bytes)
