"""What the tap sees of a graph: the cell of every token, in order, and when it cannot be relied on."""

from __future__ import annotations

import llama_cpp
import numpy as np
import pytest
from engine_help import assert_map_is_true, logits_after, plain_twin, some_tokens
from llama_cpp import _internals

from psi_kv_governor.ledger import LIVE
from psi_kv_governor.policy.base import Range

pytestmark = pytest.mark.llama


def decode_past_the_governor(llm, tokens: list[int], start: int) -> None:
    """A decode by the C interface, as a library on top of `Llama` may make it."""
    batch = _internals.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1, verbose=False)
    batch.set_batch(tokens, n_past=start, logits_all=False)
    assert llama_cpp.llama_decode(llm.ctx, batch.batch) == 0
    batch.close()
    llm.n_tokens = start + len(tokens)


def test_each_token_has_its_cell_in_order(open_llm):
    llm = open_llm(n_batch=100, n_ubatch=32)
    llm.eval(some_tokens(250))
    assert llm._engine.track.map.cells(Range(0, 250)).tolist() == list(range(250))
    assert_map_is_true(llm)


def test_tokens_that_fill_freed_cells_are_found_there(open_llm):
    llm = open_llm(n_batch=64, n_ubatch=16)
    llm.eval(some_tokens(300))
    llm._engine.trim([Range(50, 90), Range(120, 121)], None)
    llm.eval(some_tokens(60, seed=1))
    cells = llm._engine.track.map.cells(Range(300, 360))
    assert cells[:41].tolist() == [*range(50, 90), 120]
    assert cells[41:].tolist() == list(range(300, 319))
    assert_map_is_true(llm)


def test_a_log_that_overflowed_is_not_relied_on_until_the_cache_is_empty(open_llm):
    llm = open_llm()
    llm._tap.reserve(10)  # room for 20
    llm.eval(some_tokens(30))
    able = llm.governor.capabilities
    assert not able.spill.able
    assert not able.release.able
    assert "until the cache is next empty" in able.spill.why
    llm.eval(some_tokens(5))
    assert not llm.governor.capabilities.spill.able

    llm._tap.reserve(llm.n_ctx())
    llm.reset()
    llm.eval(some_tokens(30))
    assert llm.governor.capabilities.spill.able
    assert llm._engine.ledger.count(LIVE) == 30
    assert_map_is_true(llm)


def test_a_decode_past_the_governor_is_entered_before_anything_is_released(open_llm):
    llm = open_llm()
    tokens = some_tokens(400)
    llm.eval(tokens)
    llm._ctx.kv_cache_seq_rm(-1, 200, -1)  # 200 dead cells whose pages are still resident ...
    decode_past_the_governor(llm, tokens[200:400], 200)  # ... and taken again
    assert llm._engine.release() == 0
    twin = plain_twin(llm)
    twin.eval(tokens[:200])
    twin.eval(tokens[200:400])
    np.testing.assert_array_equal(logits_after(llm, 5), logits_after(twin, 5))
    assert_map_is_true(llm)


def test_tokens_nobody_told_of_are_not_evicted(open_llm):
    """They could not be recomputed. The positions held other tokens before, which must not pass for them."""
    llm = open_llm()
    llm.eval(some_tokens(200))
    llm._ctx.kv_cache_seq_rm(-1, 100, -1)
    decode_past_the_governor(llm, some_tokens(60, seed=1), 100)
    result = llm._engine.trim([Range(20, 150)], None)
    assert result.cells == 0
    assert "tokens are not known" in result.problem
    assert llm._engine.trim([Range(20, 100)], None).cells == 80
    assert llm._engine.trim([Range(100, 150)], llm.governor._store).spilled == 50


def test_closing_it_twice_frees_it_once(open_llm):
    llm = open_llm()
    llm._tap.close()
    llm._tap.close()
    assert llm._tap.user_data is None
