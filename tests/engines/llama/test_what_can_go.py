"""The table "What can be given up" of docs/how-it-works.md, cell by cell, on a real cache of each kind."""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from gguf_models import LARGE, LARGE_HYBRID, LARGE_SLIDING, MAMBA, Shape
from psi_kv_governor.cache import Plan, Range, Step, Verb
from psi_kv_governor.engines.llama.client import Client, InProcess
from psi_kv_governor.engines.llama.engine import LlamaEngine
from waiting import until

pytestmark = pytest.mark.llama
TOKENS = [int(token) for token in np.random.default_rng(5).integers(3, 250, 3000)]
LARGE_MAMBA = Shape(MAMBA.arch, n_embd=256, n_layer=2, state_layers=(0, 1))


class Row(NamedTuple):
    """A row of the table: how its model is opened, and what each cell says."""

    shape: Shape
    flash: bool
    left_share: float | None
    """What stays resident of a long context when it became a short one; None where nothing is released."""
    park_share: float
    """Of the resident bytes of all of its caches, when idle."""
    mask: bool
    sequences: int = 1


ROWS = {
    "transformer, cache in RAM, `flash_attn=True`": Row(LARGE, True, 0.1, 0.95, True),
    "flash attention off (upstream's default in Python)": Row(LARGE, False, 0.75, 0.95, False),
    "sliding window (Gemma 3)": Row(LARGE_SLIDING, True, 0.3, 0.9, True),
    "hybrid (attention and recurrent layers)": Row(LARGE_HYBRID, True, 0.1, 0.9, True),
    "recurrent (Mamba)": Row(LARGE_MAMBA, True, None, 0.9, False, sequences=64),
}


class Untouched(NamedTuple):
    """Whole states of one that nothing is taken from: of 2,000 tokens, of 40 more, and of 50 others."""

    long: bytes
    longer: bytes
    short: bytes


@functools.lru_cache(maxsize=1)  # either backing is compared with it
def untouched(path: str, row: Row) -> Untouched:
    llm = open_llm(path, row)
    states = []
    for begin, tokens in ((0, TOKENS[:2000]), (2000, TOKENS[2000:2040]), (0, TOKENS[:50])):
        if not begin:
            llm.reset()
        llm.eval(tokens)
        states.append(state_of(llm))
    llm.close()
    return Untouched(*states)


def open_llm(path, row: Row):
    """A `Llama`, with room for several sequences where the row wants that: a state is small otherwise."""
    import llama_cpp
    from llama_cpp import _internals

    small = {"n_ctx": 4096, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    llm = llama_cpp.Llama(str(path), flash_attn=row.flash, **small)
    if row.sequences > 1:
        llm._ctx.close()
        llm.context_params.n_seq_max = row.sequences
        llm._ctx = _internals.LlamaContext(model=llm._model, params=llm.context_params, verbose=False)
    return llm


def state_of(llm) -> bytes:
    import llama_cpp

    size = llama_cpp.llama_state_get_size(llm.ctx)
    buffer = (ctypes.c_uint8 * size)()
    return bytes(buffer)[: llama_cpp.llama_state_get_data(llm.ctx, buffer, size)]


def do(engine, verb, *ranges):
    """To every sequence of every cache that can take it; gives the results by cache."""
    return [
        engine.apply(Plan(steps=(Step(verb=verb, cache=cache.id, sequence=sequence, ranges=ranges),)))
        for cache in engine.snapshot().caches
        if verb is not Verb.MASK or cache.maskable
        for sequence in ([None] if verb is Verb.RELEASE else [one.id for one in cache.sequences])
    ]


@pytest.mark.parametrize("backing", ["file", "memory"])
@pytest.mark.parametrize("kind", ROWS)
def test_each_cell_of_the_table_is_true(kind, backing, tiny_model, folder, agent):
    row = ROWS[kind]
    path = tiny_model(row.shape)
    twin = untouched(str(path), row)
    agent.configure(str(folder), in_file=backing == "file", reserve_bytes=0, limit_bytes=0)
    llm = open_llm(path, row)
    address = ctypes.cast(llm.ctx, ctypes.c_void_p).value
    client = Client(InProcess(agent.serve))
    engine = LlamaEngine(client, pid=1, place=str(folder), backing=backing, context=lambda: address)
    llm.eval(TOKENS[:2000])

    whole, resident = state_of(llm), resident_of(engine)
    parked = sum(result.bytes_returned for result in do(engine, Verb.PARK))
    assert parked >= row.park_share * resident, (parked, resident)
    assert state_of(llm) == whole == twin.long
    llm.eval(TOKENS[2000:2040])
    assert state_of(llm) == twin.longer

    masked = do(engine, Verb.MASK, Range(300, 1500)) if row.mask else []
    assert any(cache.maskable for cache in engine.snapshot().caches) == row.mask
    assert any(result.masked == 1200 for result in masked) == row.mask
    do(engine, Verb.UNMASK)
    assert state_of(llm) == twin.longer

    if row.left_share is not None:
        llm.reset()
        llm.eval(TOKENS[:50])
        # A page that the disk is just taking can't be dropped: it goes the next time.
        until(lambda: do(engine, Verb.RELEASE) and resident_of(engine) < row.left_share * resident)
        assert state_of(llm) == twin.short
    assert engine.describe().capabilities.release.able == (row.left_share is not None)
    llm.close()


def resident_of(engine) -> int:
    return sum(cache.resident_bytes for cache in engine.snapshot().caches)


def test_the_table_has_these_rows_and_says_what_was_measured():
    page = (Path(__file__).parents[3] / "docs/how-it-works.md").read_text()
    table = page.split("## What can be given up", 1)[1]
    rows = {line.split("|")[1].strip(): line.split("|")[2:] for line in table.splitlines() if "|" in line}
    for kind, row in ROWS.items():
        release, park, mask, gains, _ = (cell.strip() for cell in rows[kind][:5])
        assert (release != "no") == (row.left_share is not None), kind
        assert park != "no", kind
        assert (mask != "no") == row.mask, kind
        share = re.search(r"(\d+) %", gains)
        assert share is not None, kind
        assert int(share[1]) == round(100 * row.park_share), kind
