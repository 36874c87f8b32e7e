"""Where a report goes. One that is there already is never written over."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

RESULT = "result.json"


def default_folder(now: datetime.datetime) -> Path:
    """A new folder for each run of the benchmark."""
    return Path("out") / f"pressure-{now:%Y%m%d-%H%M%S}"


def why_unusable(folder: Path) -> str:
    """Why no report can be written to `folder`, which need not exist; empty when one can."""
    if (folder / RESULT).exists():
        return f"{folder} holds a report already"
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        return f"{nearest} is not a folder"
    if not os.access(nearest, os.W_OK | os.X_OK):
        return f"{nearest} is not writable"
    return ""
