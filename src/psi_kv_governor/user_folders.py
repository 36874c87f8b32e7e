"""Where the user's own files belong: by platformdirs where it is there, else as on Linux.

The library does without platformdirs, so that importing it needs numpy and msgspec only.
"""

from __future__ import annotations

import os
from pathlib import Path

_NAME = "psi-kv"


def cache_folder() -> Path:
    """The folder for what can be made again. It need not exist yet."""
    try:
        import platformdirs
    except ImportError:
        return _named("XDG_CACHE_HOME", "~/.cache")
    return Path(platformdirs.user_cache_dir(_NAME))


def data_folder() -> Path:
    """The folder for what was fetched. It need not exist yet."""
    try:
        import platformdirs
    except ImportError:
        return _named("XDG_DATA_HOME", "~/.local/share")
    return Path(platformdirs.user_data_dir(_NAME))


def _named(variable: str, otherwise: str) -> Path:
    # os.path: without a HOME and an entry in passwd it leaves ~ as it is, where Path raises.
    return Path(os.path.expanduser(os.environ.get(variable) or otherwise)) / _NAME  # noqa: PTH111
