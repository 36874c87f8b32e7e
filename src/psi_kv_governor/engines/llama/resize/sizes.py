"""How many cells a context of another size may have."""

from __future__ import annotations

from typing import Any, NamedTuple

import llama_cpp

PAD_CELLS = 256
"""llama.cpp rounds a context up to so many cells."""

SLACK_CELLS = 32
"""Cells left free by a smaller context: the next tokens don't grow it at once."""

GROWTH = 1.25
"""A context that is full grows by a quarter: each time takes a tenth of a second or more."""


class Sizes(NamedTuple):
    """What holds for all contexts of one model."""

    logical: int
    """Cells that the program asked for, and is shown."""
    least: int
    """Fewer would change what the model computes."""

    def for_cells(self, cells: int) -> int:
        """The smallest context for so many."""
        return min(self.logical, max(self.least, padded(cells + SLACK_CELLS)))

    def grown(self, cells: int) -> int:
        """A context for so many, and some more."""
        return min(self.logical, max(self.for_cells(cells), padded(int(cells * GROWTH))))


def sizes_of(model: Any, params: Any, logical: int) -> Sizes:
    """Models with two sets of factors for short and long contexts (long-rope) choose by the number of cells:
    a smaller context stays on the side on which the whole one is."""
    limit = params.yarn_orig_ctx or _number(model, "rope.scaling.original_context_length")
    least = limit + 1 if 0 < limit < logical else 1
    return Sizes(logical, min(logical, padded(least)))


def why_not(model: Any, params: Any) -> str:
    """Why contexts of this model can't be made anew with another size; '' where they can."""
    if llama_cpp.llama_model_is_recurrent(model) or llama_cpp.llama_model_is_hybrid(model):
        return "a recurrent state has no cells"
    if llama_cpp.llama_model_n_swa(model) > 0 and not params.swa_full:
        return (
            "a sliding-window model saves only its window, so that a conversation could not be taken up "
            "further back: open it with swa_full=True"
        )
    if params.embeddings:
        return "a model that makes embeddings keeps nothing between two calls"
    if params.n_seq_max != 2 or not params.kv_unified:
        return "the context was made for several sequences"
    return ""


def padded(cells: int) -> int:
    """As llama.cpp rounds it."""
    return -(-cells // PAD_CELLS) * PAD_CELLS


def _number(model: Any, key: str) -> int:
    """A number of the model file's metadata; 0 where there is none."""
    import ctypes

    text = ctypes.create_string_buffer(64)
    if llama_cpp.llama_model_meta_val_str(model, b"general.architecture", text, len(text)) < 0:
        return 0
    name = text.value + b"." + key.encode()
    if llama_cpp.llama_model_meta_val_str(model, name, text, len(text)) < 0:
        return 0
    return int(text.value) if text.value.isdigit() else 0
