"""A model on a device, in a process of its own: what is measured there, as JSON. Decoding costs half a second
a token in a driver made of software, so that few are decoded.

    device_child.py BACKEND MODEL FOLDER WHAT [CELLS,TOKENS]

On a card, `libggml-cuda.so model.gguf /var/tmp f16 32768,30000` measures how long changes take."""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

from psi_kv_governor.engines.llama import loader

assert loader.load().agent is not None, loader.load().why

import llama_cpp  # noqa: E402
import numpy as np  # noqa: E402
from resize_help import apply, cache_of, cells, next_logits, resident_bytes  # noqa: E402

from fakes import FakeSource  # noqa: E402
from psi_kv_governor import GovernedLlama, GovernorConfig  # noqa: E402
from psi_kv_governor.cache import Result, Verb  # noqa: E402
from psi_kv_governor.engines.llama import devices  # noqa: E402

TEXT = (
    b"Once upon a time there was a small machine that had too little memory, and it remembered all the same"
)
TOKENS = 4


def load_backend(path: str) -> None:
    """Before any model is opened, and into the registry that llama.cpp looks at."""
    ggml: Any = devices.bound()
    ggml.ggml_backend_load.restype = ctypes.c_void_p
    assert ggml.ggml_backend_load(path.encode()), path


def open_llm(model: str, folder: str, **arguments: Any) -> GovernedLlama:
    """In batches that take vectors times matrices only: what is larger the driver compiles for seconds."""
    config = GovernorConfig(place=folder, place_reserve_bytes=0, status_socket=False)
    chosen = {
        "n_ctx": 8192, "n_gpu_layers": -1, "flash_attn": True, "n_threads": 1, "n_threads_batch": 1,
        "n_batch": 8, "verbose": False, "auto": False, "source": FakeSource(), **arguments,
    }  # fmt: skip
    return GovernedLlama(model, config=config, **chosen)


def address_bytes() -> int:
    return int(Path("/proc/self/statm").read_bytes().split()[0]) * 4096


def peak_bytes(*, reset: bool = False) -> int:
    """Most that was resident since it was reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def free_bytes() -> int:
    """Of the device, as its driver says it; lavapipe's says the same always."""
    return next(device.free_bytes for device in devices.devices() if device.is_gpu)


def steps(llm: GovernedLlama, between: Any = lambda i: None) -> tuple[list[int], list[Any]]:
    """Greedy tokens and the logits of each, with something done between them; the end is as the beginning."""
    tokens, logits, begin = [], [], llm.n_tokens
    for i in range(TOKENS):
        between(i)
        llm.eval([tokens[-1] if tokens else 28])
        logits.append(np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).copy())
        tokens.append(llm.sample(temp=0.0))
    llm.n_tokens = begin
    return tokens, logits


def resize(model: str, folder: str, kind: int, size: str = "") -> dict[str, Any]:
    """Smaller and whole again, with a generation before, in the middle and after. `size`: cells, and how many
    of them are filled, by batches of 512."""
    n_cells, n_tokens = map(int, size.split(",")) if size else (8192, 0)
    arguments = {"n_batch": 512} if size else {}
    llm = open_llm(model, folder, n_ctx=n_cells, type_k=kind, type_v=kind, **arguments)
    llm.eval([i * 7 % 240 + 5 for i in range(n_tokens)] or llm.tokenize(TEXT))
    llm.sample(temp=0.0)
    moves = []

    def move(verb: Verb, *ranges: tuple[int, int]) -> Result:
        free, begun = free_bytes(), time.perf_counter()
        result = apply(llm, verb, *ranges)
        moves.append([verb.value, time.perf_counter() - begun, free_bytes() - free])
        return result

    before = steps(llm)
    start = peak_bytes(reset=True)
    start_bytes = resident_bytes()
    smaller = move(Verb.RELEASE)
    least, least_bytes = cells(llm), resident_bytes()
    # Smaller, parked and whole by turns, between two tokens each.
    verbs = [Verb.RELEASE, Verb.PARK, Verb.UNPARK, Verb.RELEASE]
    middle = steps(llm, lambda i: move(verbs[i]))
    move(Verb.PARK)
    move(Verb.UNPARK)
    masked = move(Verb.MASK, (4, max(16, n_tokens // 2)))
    without = next_logits(llm, 28)
    whole = move(Verb.UNMASK)
    after = steps(llm)
    told = {
        "description": llm.governor.engine.describe().details["backing"],
        "domain": llm.governor.engine.describe().domain.value,
        "least_cells": least,
        "computed_bytes": (n_cells - least) * cache_of(llm).cell_bytes,
        "returned_bytes": smaller.bytes_returned,
        "measured_bytes": start_bytes - least_bytes,
        "peak_above_start_bytes": peak_bytes() - max(start, start_bytes),
        "masked": masked.masked,
        "mask_changes": bool(np.any(without != before[1][0])),
        "cells_after": cells(llm),
        "back": whole.cells,
        "tokens": [before[0], middle[0], after[0]],
        "same_in_the_middle": all(map(np.array_equal, before[1], middle[1])),
        "same_after": all(map(np.array_equal, before[1], after[1])),
        "moves": moves,
    }
    llm.close()
    return told


def places(model: str, folder: str) -> dict[str, Any]:
    """Where caches are, by how much of the model is on the device. Nothing is decoded."""
    told = {}
    for name, arguments in {
        "whole": {"n_gpu_layers": -1, "source": None},
        "partial": {"n_gpu_layers": 20},
        "none": {"n_gpu_layers": 0},
        "host": {"n_gpu_layers": -1, "offload_kqv": False},
    }.items():
        llm = open_llm(model, folder, n_ctx=2048, n_batch=128, **arguments)
        description = llm.governor.engine.describe()
        told[name] = [description.domain.value, description.details.get("backing", "")]
        told[f"{name} source"] = llm.governor.status().source
        llm.close()
    return told


def host(model: str, folder: str) -> dict[str, Any]:
    """Weights on the device, keys and values in the host's memory: pages are parked there."""
    llm = open_llm(model, folder, n_ctx=2048, offload_kqv=False)
    llm.eval(llm.tokenize(TEXT))
    llm.sample(temp=0.0)
    before = steps(llm)
    parked = apply(llm, Verb.PARK)
    middle = steps(llm)
    masked = apply(llm, Verb.MASK, (4, 16))
    told = {
        "domain": llm.governor.engine.describe().domain.value,
        "live_bytes": llm.n_tokens * cache_of(llm).cell_bytes,
        "parked_bytes": parked.bytes_returned,
        "masked": [masked.masked, masked.problem],
        "mask": llm.governor.engine.describe().capabilities.mask.why,
        "tokens": [before[0], middle[0]],
        "same": all(map(np.array_equal, before[1], middle[1])),
    }
    llm.close()
    return told


def outputs(model: str, folder: str) -> dict[str, Any]:
    """Bytes of addresses that a context takes with and without the limit of outputs."""
    del folder
    found = {}
    for limit in (0, 4):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 512
        params.flash_attn_type = 1
        params.n_outputs_max = limit
        loaded = llama_cpp.llama_model_load_from_file(model.encode(), _on_device())
        before = address_bytes()
        context = llama_cpp.llama_init_from_model(loaded, params)
        found[str(limit)] = address_bytes() - before
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(loaded)
    return found


def doctor(model: str, folder: str) -> dict[str, Any]:
    """What the doctor says of the devices, and of a cache on one."""
    from psi_kv_governor.llama_doctor import check_cache, check_devices

    llm = open_llm(model, folder, n_ctx=2048, n_batch=128)
    found, cache = check_devices(), check_cache(llm.governor.engine.describe())
    llm.close()
    return {"devices": [found.detail, *found.more], "cache": [cache.detail, *cache.more]}


def _on_device() -> Any:
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = -1
    return params


def main() -> None:
    backend, model, folder, what, *size = sys.argv[1:]
    load_backend(backend)
    llama_cpp.llama_backend_init()
    actions = {
        "f16": lambda: resize(model, folder, 1, *size),
        "q8_0": lambda: resize(model, folder, 8, *size),
        "places": lambda: places(model, folder),
        "host": lambda: host(model, folder),
        "doctor": lambda: doctor(model, folder),
        "outputs": lambda: outputs(model, folder),
    }
    print(json.dumps(actions[what]()))


if __name__ == "__main__":
    main()
