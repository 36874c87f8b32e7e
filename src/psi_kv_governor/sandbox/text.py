"""The text that contexts are filled with."""

from __future__ import annotations

from itertools import cycle
from typing import Any

from psi_kv_governor.errors import PsiKvError

_CHARACTERS_PER_TOKEN = 8  # more than English has with any vocabulary, so that the text is long enough


def prompt_text(n_characters: int) -> str:
    """English that every Python has: its own reference manual, in a fixed order."""
    from pydoc_data.topics import topics  # type: ignore[import-untyped, unused-ignore]

    parts: list[str] = []
    size = 0
    for name in cycle(sorted(topics)):  # no more than is needed: this process's memory is measured
        parts.append(topics[name])
        size += len(parts[-1])
        if size >= n_characters:
            break
    return "".join(parts)[:n_characters]


def prompt_tokens(llm: Any, count: int) -> list[int]:
    """The first `count` tokens of that text. Raises PsiKvError when it has fewer."""
    tokens: list[int] = llm.tokenize(prompt_text(count * _CHARACTERS_PER_TOKEN).encode())[:count]
    if len(tokens) < count:
        raise PsiKvError(f"the text has {len(tokens)} tokens with this model, and {count} are needed")
    return tokens
