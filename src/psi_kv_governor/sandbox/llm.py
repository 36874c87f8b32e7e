"""The one place that knows how a model is opened and governed, for everything that is shown and measured."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.events import Event
from psi_kv_governor.sandbox.messages import Setup, Turned, Variant

_GGML_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}  # enum ggml_type, <ggml.h>
_BACKINGS: dict[Variant, str] = {"psi-file": "file", "psi-memory": "memory", "file-only": "file"}


class Cells(NamedTuple):
    """Where the cells of a context are."""

    live: int
    masked: int
    lost: int


def is_governed(variant: Variant) -> bool:
    """Whether a governor acts in it."""
    return variant.startswith("psi")


def is_plain(variant: Variant) -> bool:
    """Whether it is llama_cpp.Llama and nothing else."""
    return variant in {"fixed", "reference"}


def llama_class(variant: Variant) -> Any:
    """The class of a variant, with all of its modules loaded: which comes first matters.

    Raises PsiKvError where plain llama.cpp is not plain in this process.
    """
    if is_plain(variant):
        import llama_cpp

        check_plain()
        return llama_cpp.Llama
    from psi_kv_governor.llama import GovernedLlama

    return GovernedLlama


def check_plain(maps: Path = Path("/proc/self/maps")) -> None:
    """Raises PsiKvError where a library of the governor is in this process."""
    try:
        lines = maps.read_text().splitlines()
    except OSError:
        return
    files = {Path(line.split(maxsplit=5)[5]) for line in lines if ".so" in line and line.count(" ") >= 5}
    llamas = sorted(str(file) for file in files if file.name.startswith("libllama.so"))
    ours = sorted(file.name for file in files if "psikv" in file.name)
    if len(llamas) > 1 or ours:  # the agent stands in front of the real one, under its name
        loaded = ", ".join([*llamas, *ours])
        raise PsiKvError(f"plain llama.cpp is not plain here: {loaded}; unset LD_PRELOAD, LLAMA_CPP_LIB_PATH")


def open_llm(setup: Setup, n_ctx: int, prefill_threads: int) -> Any:
    """The model of `setup`. Only what governs it differs between variants. Raises BadInputError."""
    arguments: dict[str, Any] = {
        "n_ctx": n_ctx,
        "n_batch": setup.batch_tokens,
        "n_threads": setup.threads,
        "n_threads_batch": prefill_threads,
        "flash_attn": True,
        "type_k": _GGML_TYPES[setup.cache],
        "type_v": _GGML_TYPES[setup.cache],
        "use_mmap": setup.mmap,
        "verbose": False,
    }
    kind = llama_class(setup.variant)
    if is_plain(setup.variant):
        return kind(setup.model, **arguments)
    from psi_kv_governor.config import load_config

    auto = setup.auto and is_governed(setup.variant)
    return kind(setup.model, config=load_config(**settings_of(setup)), auto=auto, **arguments)


def settings_of(setup: Setup) -> dict[str, Any]:
    """The governor's settings that `setup` gives."""
    given = {
        "backing": _BACKINGS.get(setup.variant),
        "sink_cells": setup.keep,
        "window_cells": setup.tail,
        **setup.settings,
    }
    return {name: value for name, value in given.items() if value is not None}


def cells_of(llm: Any, variant: Variant, removed: int = 0) -> Cells:
    """Where the cells of the context are; `removed` are those that the reference took out."""
    if is_plain(variant):
        return Cells(int(llm.n_tokens) - removed, 0, removed)
    status = llm.governor.status()
    return Cells(status.live_cells, status.masked_cells, status.lost_cells)


def put_back(llm: Any) -> int:
    """Have everything back that the governor lets come back; gives the cells that stay away."""
    if llm.governor.has_room():
        llm.governor.restore()
    status = llm.governor.status()
    return int(status.masked_cells + status.lost_cells)


def why_not_governable(llm: Any) -> str:
    """Why nothing of this model can be given up; empty where something can."""
    description = llm.governor.engine.describe()
    return "" if description.place else str(description.capabilities.park.why)


def follow(
    llm: Any,
    on_event: Callable[[Event], None],
    on_turn: Callable[[], None],
    on_busy: Callable[[Turned], None],
) -> None:
    """Hear all that the governor does, each of its turns, and those that are not calm."""

    def on_any(turn: Any) -> None:
        on_turn()
        reading, decision = turn.reading, turn.decision
        if decision.mode.value == "calm" and decision.action.value == "none" and not reading.some:
            return
        on_busy(
            Turned(
                time_s=reading.time_s,
                some=reading.some,
                full=reading.full,
                headroom_bytes=reading.headroom_bytes,
                live_bytes=turn.cache.live_bytes,
                action=decision.action.value,
                n_bytes=decision.n_bytes,
                mode=decision.mode.value,
                reason=decision.reason,
            )
        )

    llm.governor.subscribe(on_event)
    llm.governor.observe(on_any)


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


def logits_of(llm: Any) -> npt.NDArray[np.float32]:
    """Of the last token that was decoded, shape (vocabulary,): not a copy."""
    import llama_cpp

    found = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    logits: npt.NDArray[np.float32] = np.ctypeslib.as_array(found, shape=(llm.n_vocab(),))
    return logits


def greedy(llm: Any) -> int:
    """The likeliest next token.

    Not by `Llama.sample`: what that makes for each token goes only with Python's collector of cycles, some
    20 MiB at a time, which looks like pressure and is as much as the cgroups here have free.
    """
    return int(np.argmax(logits_of(llm)))
