"""What differs between the versions of transformers, in one place."""

from __future__ import annotations

import re
from typing import Any

from psi_kv_governor.errors import BadInputError

OLDEST = (5, 2)
"""Older ones build their masks and caches in another way."""


def check_versions() -> None:
    """Raises BadInputError, in one line, where torch or transformers is absent or out of range."""
    try:
        import torch

        import transformers
    except ImportError as error:
        raise BadInputError(
            f"{error.name} is not installed: pip install 'psi-kv-governor[transformers]'"
        ) from error
    del torch
    found = version_of(transformers.__version__)
    if found < OLDEST or found >= (6, 0):
        raise BadInputError(
            f"transformers {transformers.__version__} is not one of 5.2 to 5.x: "
            "pip install 'transformers>=5.2,<6'"
        )


def version_of(text: str) -> tuple[int, int]:
    """Major and minor of a version."""
    match = re.match(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def cache_argument() -> str:
    """The name under which models take a cache: it changed in the fives, and the old one warns."""
    from transformers.generation import utils

    return "cache" if "cache" in utils.ALL_CACHE_NAMES else "past_key_values"


CACHE_NAMES = ("cache", "past_key_values")


def query_length(given: Any) -> int:
    """Tokens of one pass: what `get_mask_sizes` is given is their number, or (5.2) their positions."""
    return given if isinstance(given, int) else int(given.shape[0])
