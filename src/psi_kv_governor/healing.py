"""Tokens that were decoded while others were masked are decoded again, by whoever has them: the `Llama`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from psi_kv_governor.governor import Governor


class Healed(Protocol):
    """An engine that knows which tokens were decoded while others were masked."""

    def first_affected(self, sequence: int) -> int | None:
        """The first of these positions; None where there is none."""

    def masked(self, sequence: int) -> int:
        """Positions that attention passes over now."""


HEAL_AT_ONCE_CELLS = 256
"""Tokens that a request decodes again by itself when it builds on some that were decoded while others were
masked: a quarter of a second of prefill on the demo model, two on an 8B model with four cores. More are
healed where they are no more than the request's own prompt has to decode anyway: then it at most doubles."""


def context_of(llm: Callable[[], Any]) -> int:
    """Address of the llama_context of a `llama_cpp.Llama` (a weak reference), which upstream may replace; 0
    when it is closed or gone."""
    context = getattr(getattr(llm(), "_ctx", None), "ctx", None)
    return ctypes.cast(context, ctypes.c_void_p).value or 0 if context is not None else 0


def cut_for_request(llm: Any, governor: Governor, engine: Healed, tokens: Sequence[int]) -> None:
    """A request with these tokens is about to be computed: it decodes what was affected again, if that costs
    it little."""
    kept = llm.longest_token_prefix(llm._input_ids.tolist(), list(tokens))
    cut_affected(llm, governor, engine, kept, max(HEAL_AT_ONCE_CELLS, len(tokens) - kept))


def heal(llm: Any, governor: Governor, engine: Healed) -> int:
    """Decode all affected tokens of `llm` again, if there is room. Gives how many."""
    tokens = cut_affected(llm, governor, engine, llm.n_tokens, llm.n_tokens)
    if tokens:
        llm.eval(tokens)
    return len(tokens)


def cut_affected(llm: Any, governor: Governor, engine: Healed, length: int, most: int) -> list[int]:
    """Cut the affected tail of the first `length` tokens, if it has at most `most`: the next evaluation
    decodes it again. Gives the tokens cut.

    A sequence's tail can only be decoded again as a whole: it is cut before the first affected position.
    """
    first = engine.first_affected(0) if length else None
    if first is None or first >= length or length - first > most or not governor.has_room():
        return []
    governor.restore()
    if engine.masked(0):
        return []  # they would only be affected again
    tokens: list[int] = llm._input_ids[first:length].tolist()
    llm.n_tokens = first
    return tokens
