"""A context that is made anew on the CPU, where it is forced: what its tests share."""

from __future__ import annotations

from typing import Any

SMALL = {"n_ctx": 4096, "n_threads": 1, "n_threads_batch": 1, "verbose": False, "flash_attn": True}
SETTINGS = {
    "sink_cells": 16, "window_cells": 32, "block_cells": 16, "floor_cells": 32, "status_socket": False,
    "residence": "resize",
}  # fmt: skip
PROMPT = "the cat sat on the mat and it was " * 7
TOKEN = 7
MIB = 1 << 20


def filled(llm: Any, text: str = PROMPT) -> Any:
    llm.eval(llm.tokenize(text.encode()))
    return llm


def text_of(result: Any) -> str:
    return result["choices"][0]["text"]
