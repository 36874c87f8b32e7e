"""Opening a model: whether it can be governed, what to call it, and what to say about the rest."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from psi_kv_governor.engine.base import Capabilities
from psi_kv_governor.engine.llama import native
from psi_kv_governor.errors import EngineError

_log = logging.getLogger("psi_kv_governor")


def why_ungovernable(kwargs: dict[str, Any]) -> str:
    """Why a model opened with these arguments can't be governed, or ''."""
    if kwargs.get("embedding"):
        return "an embedding context keeps its cache for one batch only"
    if kwargs.get("vocab_only"):
        return "only the vocabulary is loaded"
    if hasattr(kwargs.get("chat_handler"), "clip_model_path"):
        return "image input is decoded without safe points"
    try:
        native.load()
    except EngineError as error:
        return str(error)
    return ""


def say_what_is_missing(able: Capabilities, late: str) -> None:
    """A line in the log for each reason why a step can't be done; `late` is from load_before_llama_cpp."""
    reasons: dict[str, list[str]] = {}
    for step in ("release", "spill", "recompute"):
        capability = getattr(able, step)
        if not capability.able:
            reasons.setdefault(capability.why, []).append(step)
    for why, steps in reasons.items():
        _log.warning("no %s: %s", ", ".join(steps), why)
    if late and not reasons:
        _log.info("%s; the cache is demand-paged all the same, from after its creation on", late)


def fingerprint(path: Path) -> str:
    """Tells one model file from another: size, time of change, and a hash of its first MiB (the metadata).

    Not of the whole: reading 8 GB would take longer than loading them does.
    """
    status = path.stat()
    with path.open("rb") as file:
        head = hashlib.sha256(file.read(1 << 20)).hexdigest()[:16]
    return f"{head}-{status.st_size}-{status.st_mtime_ns}"
