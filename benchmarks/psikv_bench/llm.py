"""What the benchmarks do with a model beyond opening and decoding (`psi_kv_governor.sandbox.llm`)."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, NamedTuple

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.sandbox.llm import open_llm
from psikv_bench.messages import Setup


def opened(setup: Setup) -> Any:
    """The model of `setup`: only what governs it differs between variants. Raises BadInputError."""
    return open_llm(
        setup.model,
        plain=setup.plain,
        auto=setup.auto and setup.governed,
        settings=setup.governor_settings(),
        **setup.arguments(),
    )


class Cells(NamedTuple):
    """Where the cells of a context are."""

    live: int
    masked: int
    """Away, and to come back bit for bit."""
    lost: int
    """Away, and to be decoded again."""


def cells_of(llm: Any, *, plain: bool) -> Cells:
    """Where the cells of the context are."""
    if plain:
        return Cells(int(llm.n_tokens), 0, 0)
    status = llm.governor.status()
    return Cells(status.live_cells, status.masked_cells, status.lost_cells)


def why_not_governable(llm: Any) -> str:
    """Why nothing of this model can be given up; empty where something can."""
    description = llm.governor.engine.describe()
    return "" if description.place else str(description.capabilities.park.why)


def load_state(llm: Any, path: str, tokens: list[int]) -> None:
    """The context `tokens` from a state file, which llama.cpp streams: no copy of it in this process.

    Raises PsiKvError where the file does not hold them.
    """
    import llama_cpp

    count = len(tokens)
    found, read = (llama_cpp.llama_token * count)(), ctypes.c_size_t()
    done = llama_cpp.llama_state_seq_load_file(llm.ctx, path.encode(), 0, found, count, ctypes.byref(read))
    if not done or read.value != count:
        raise PsiKvError("the prepared context could not be loaded: start the benchmark again")
    llm.input_ids[:count] = tokens
    llm.n_tokens = count


def save_state(llm: Any, path: str, count: int) -> None:
    """Write the first `count` tokens of the context to a file. Raises PsiKvError."""
    import llama_cpp

    cut(llm, count)
    tokens = (llama_cpp.llama_token * count)(*llm.input_ids[:count].tolist())
    if not llama_cpp.llama_state_seq_save_file(llm.ctx, path.encode(), 0, tokens, count):
        raise PsiKvError(f"the prepared context could not be kept: is there space in {Path(path).parent}?")


def cut(llm: Any, count: int) -> None:
    """Take out what comes after the first `count` tokens."""
    llm.n_tokens = count
    llm._ctx.kv_cache_seq_rm(0, count, -1)


def cell_bytes(llm: Any) -> int:
    """K and V of one token in every layer, by what a saved context takes; 0 without a token."""
    import llama_cpp

    return llama_cpp.llama_state_seq_get_size(llm.ctx, 0) // int(llm.n_tokens) if llm.n_tokens else 0
