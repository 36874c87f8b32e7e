"""Cutting a context off anywhere, inside a hole or beside it, leaves one that can be decoded on."""

from __future__ import annotations

import numpy as np
import pytest
from engine_help import (
    assert_map_is_true,
    evict,
    logits_after,
    plain_twin,
    rows_at,
    some_tokens,
    spill,
)

from psi_kv_governor.ledger import LOST, SPILLED
from psi_kv_governor.policy.base import Range

pytestmark = pytest.mark.llama
PROMPT = some_tokens(300)
MESSAGES = [{"role": "user", "content": "what is it that you are in? " * 12}]


@pytest.mark.parametrize("give_up", [spill, evict])
@pytest.mark.parametrize("cut", [21, 60, 99, 100])
def test_a_cut_inside_or_at_a_hole_leaves_the_context_usable(open_llm, give_up, cut):
    llm = open_llm(n_batch=32)
    twin = plain_twin(llm, n_batch=32)
    llm.eval(PROMPT), twin.eval(PROMPT)
    give_up(llm, (20, 100))
    for model in (llm, twin):
        model.n_tokens = cut
    np.testing.assert_allclose(
        logits_after(llm, 5), logits_after(twin, 5), atol=0 if give_up is spill else 1e-3
    )
    assert len(llm._engine.ledger) == cut + 1
    assert_map_is_true(llm)


@pytest.mark.parametrize("give_up", [spill, evict])
def test_a_cut_at_the_start_of_a_hole_needs_nothing_back(open_llm, give_up):
    llm = open_llm()
    twin = plain_twin(llm)
    llm.eval(PROMPT), twin.eval(PROMPT)
    give_up(llm, (20, 100))
    for model in (llm, twin):
        model.n_tokens = 20
    np.testing.assert_array_equal(logits_after(llm, 5), logits_after(twin, 5))
    assert (len(llm._engine.ledger), llm.governor.status().store_bytes) == (21, 0)


def test_a_blob_cut_in_its_middle_comes_back_in_part(open_llm):
    llm = open_llm()
    twin = plain_twin(llm)
    llm.eval(PROMPT), twin.eval(PROMPT)
    before = [rows_at(llm, p) for p in range(20, 150)]
    spill(llm, (20, 150))
    for model in (llm, twin):
        model.n_tokens = 120
        model._ctx.kv_cache_seq_rm(-1, 120, -1)
    assert llm.governor.restore(30).cells == 30
    assert llm.governor.status().spilled_cells == 70
    np.testing.assert_array_equal(logits_after(llm, 5), logits_after(twin, 5))
    assert [rows_at(llm, p) for p in range(20, 120)] == before[:100]


def test_a_range_that_came_back_and_went_again_is_found(open_llm):
    llm = open_llm()
    twin = plain_twin(llm)
    llm.eval(PROMPT), twin.eval(PROMPT)
    spill(llm, (20, 120))
    assert llm.governor.restore(30).cells == 30
    spill(llm, (20, 50))  # in a blob of its own: the older one begins at the same position
    for model in (llm, twin):
        model.n_tokens = 100
    np.testing.assert_array_equal(logits_after(llm, 5), logits_after(twin, 5))
    assert llm._engine.ledger.holes() == 0


def test_lost_tokens_wait_for_the_spilled_ones_before_them(open_llm):
    llm = open_llm()
    llm.eval(PROMPT)
    spill(llm, (20, 50))
    evict(llm, (50, 80))
    assert llm._engine.recompute(100) == 0
    assert llm.governor.restore().missing == 30
    assert llm._engine.recompute(100) == 30


def test_the_last_position_stays(open_llm):
    llm = open_llm()
    llm.eval(PROMPT)
    llm._engine.trim([Range(0, 300)], llm.governor._store)
    assert llm.governor.status().live_cells == 1
    llm.eval([5])
    assert llm.governor.status().live_cells == 2
    assert llm.governor.restore().missing == 0


def test_a_full_context_says_so_and_goes_on(open_llm):
    llm = open_llm(n_ctx=256)
    with pytest.raises(RuntimeError, match="llama_decode returned 1"):
        llm.eval(some_tokens(300))
    llm.reset()
    llm.eval(PROMPT[:250])
    evict(llm, (50, 200))  # llama.cpp has room by now, the context has not
    with pytest.raises(RuntimeError, match="llama_decode returned 1"):
        llm.eval(PROMPT[:20])
    llm.eval(PROMPT[:6])
    assert len(llm._engine.ledger) == 256
    assert llm.make_whole() == 0
    assert_map_is_true(llm)


def test_positions_say_where_they_are_at_every_step(open_llm):
    llm = open_llm()
    llm.eval(PROMPT)
    spill(llm, (20, 60))
    evict(llm, (70, 100))
    status = llm.governor.status()
    assert (status.live_cells, status.spilled_cells, status.lost_cells, status.holes) == (230, 40, 30, 70)
    assert status.live_bytes == 230 * llm._engine.cell_bytes
    assert status.store_bytes >= 40 * llm._engine.cell_bytes
    assert llm._engine.ledger.count(SPILLED) + llm._engine.ledger.count(LOST) == 70
