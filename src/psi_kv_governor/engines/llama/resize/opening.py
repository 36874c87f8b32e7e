"""Which residence the cache of a `llama_cpp.Llama` gets, and what its context is asked for."""

from __future__ import annotations

import ctypes
import math
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import llama_cpp

from psi_kv_governor.cache import Domain
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.llama.client import BufferInfo
from psi_kv_governor.engines.llama.devices import device_of, free_bytes, is_the_machine_s
from psi_kv_governor.engines.llama.resize.context import ResizableContext
from psi_kv_governor.engines.llama.resize.engine import ResizingEngine
from psi_kv_governor.engines.llama.resize.pieces import Place
from psi_kv_governor.engines.llama.resize.resizer import Resizer
from psi_kv_governor.engines.llama.resize.sizes import sizes_of, why_not

_OUTPUTS = 4
"""Rows of logits that one decode may give in a context made smaller: upstream asks for the last alone.
For a batch of 512 the compute buffer of SmolLM2 is 98.3 MiB, and 15.3 with so many. llama.cpp aborts where a
decode asks for more, so a context that the program made, or whose address it took, has all of them."""


def make_resizable(model: Any, params: Any, config: GovernorConfig) -> None:
    """Ask for a spare sequence in the same cells, where the cache may be on a device."""
    on_device = params.offload_kqv and llama_cpp.llama_supports_gpu_offload()
    if config.residence == "pages" or not (on_device or config.residence == "resize"):
        return
    if llama_cpp.llama_model_is_recurrent(model) or llama_cpp.llama_model_is_hybrid(model):
        return  # a second sequence is a second state there
    if params.n_seq_max == 1 and not params.embeddings:
        params.n_seq_max = 2
        params.kv_unified = True


def elsewhere(buffers: Sequence[BufferInfo]) -> str:
    """Where the cache is that these hold, if not all of it is in plain memory; else ''."""
    parts = [f"{one.name} ({one.n_bytes / 2**20:,.0f} MiB)" for one in buffers]
    return " and ".join(parts) if any(one.name != "CPU" for one in buffers) else ""


def resizing_engine(
    llm: Any, buffers: Sequence[BufferInfo], folder: str
) -> tuple[ResizingEngine | None, str]:
    """The engine of a cache whose context is made anew, or why there can be none. Neither where the cache
    gives pages back, or a part of it does."""
    residence, where = llm._psi_kv_config.residence, elsewhere(buffers)
    if residence == "pages" or not (where or residence == "resize"):
        return None, ""
    by_cell = [one for one in buffers if one.by_cell and one.rows]
    why = "" if by_cell else "no buffer of keys and values was seen"
    why = why or why_not(llm._model.model, llm.context_params)
    why = why or ("" if folder else "there is no place to park")
    if not why:
        return _engine(llm, by_cell, folder), ""
    if any(one.name == "CPU" for one in buffers):
        return None, ""
    return None, f"its cache is in {where}, where no page can be returned, and its context stays: {why}"


def _engine(llm: Any, buffers: Sequence[BufferInfo], folder: str) -> ResizingEngine:
    context, model = llm._ctx, llm._model.model
    pointer, params = context.ctx, llm.context_params
    resizer = Resizer(
        model,
        params,
        pointer,
        sizes=sizes_of(model, params, llama_cpp.llama_n_ctx(pointer)),
        place=Place(folder, llm._psi_kv_config.place_reserve_bytes),
        cell_bytes=sum(one.n_bytes // one.rows for one in buffers),
        most_outputs=0 if llm._logits_all else _OUTPUTS,
    )
    owner = weakref.ref(llm)
    resizer.on_new = lambda pointer: _dress(owner(), pointer)
    adopted = ResizableContext.adopt(context, resizer)
    adopted.fresh = lambda: _decode_last_again(owner())
    if llm._logits_all:
        adopted.patience_s = math.inf  # logits of earlier tokens can't be had again one by one
    device = next((one.name for one in buffers if one.name != "CPU"), buffers[0].name)
    named = elsewhere(buffers) or device
    own = llm._psi_kv_config.residence != "resize" and all(_has_its_own(one.name) for one in buffers)
    return ResizingEngine(
        adopted,
        place=folder,
        device=named,
        domain=Domain.DEVICE if own else Domain.MANAGED,
        free_bytes=lambda: free_bytes(device),
    )


def _has_its_own(buffer_name: str) -> bool:
    """Whether the device of this buffer has memory that the machine has not."""
    device = device_of(buffer_name)
    return device is not None and not is_the_machine_s(
        device, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )


def _decode_last_again(llm: Any) -> None:
    """A context that was made anew has no logits. The lock is held."""
    if llm is not None and llm._ctx.stale and llm.n_tokens:
        llm.n_tokens -= 1
        llm.eval([int(llm.input_ids[llm.n_tokens])])


def _dress(llm: Any, pointer: Any) -> None:
    """What upstream sets in a context after it is made."""
    if llm is not None and llm._lora_adapter is not None:
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(llm._lora_adapter)
        llama_cpp.llama_set_adapters_lora(pointer, adapters, 1, (ctypes.c_float * 1)(llm.lora_scale))


# -- what GovernedLlama does with a context of either kind ---------------------------------------------------


def pin(context: Any) -> None:
    """The program took its address."""
    if isinstance(context, ResizableContext):
        context.pin("the program took the context's address")


def leave(context: Any) -> None:
    """The model is about to be closed: nothing of it need come back for that."""
    if isinstance(context, ResizableContext):
        context.why_pinned = "the model is closed"


@contextmanager
def still(context: Any) -> Iterator[None]:
    """It is not made anew meanwhile, and has the logits of the last token."""
    if not isinstance(context, ResizableContext):
        yield
        return
    with context.lock:
        context.fresh()
        yield


@contextmanager
def replaced(context: Any) -> Iterator[None]:
    """Another state is put into it meanwhile."""
    if not isinstance(context, ResizableContext):
        yield
        return
    with context.lock:
        context.replaced()
        try:
            yield
        finally:
            context.resizer.look()


def taken(context: Any, *, last: bool) -> None:
    """A token was sampled, the last one's logits or earlier ones'."""
    if isinstance(context, ResizableContext):
        context.taken(last=last)
