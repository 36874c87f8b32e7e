"""A context that can't be made anew for want of memory or disk; and its compute buffer."""

from __future__ import annotations

import functools

import llama_cpp
import numpy as np
import pytest
from resize_cpu import PROMPT, SETTINGS, SMALL, TOKEN, filled
from resize_help import apply, cells, next_logits

from psi_kv_governor.cache import Verb
from psi_kv_governor.engines.llama.resize import resizer as resizing

pytestmark = pytest.mark.llama


@pytest.fixture
def open_llm(open_tiny):
    return functools.partial(open_tiny, SETTINGS, SMALL)


# -- bad days --------------------------------------------------------------------------------------------


def fail(monkeypatch, fails) -> None:
    """Have llama.cpp make no context of so many cells."""
    real = llama_cpp.llama_init_from_model
    monkeypatch.setattr(
        resizing.llama_cpp,
        "llama_init_from_model",
        lambda model, params: None if fails(params.n_ctx) else real(model, params),
    )


def test_no_memory_for_the_smaller_context_leaves_the_old_one(open_llm, monkeypatch):
    llm = filled(open_llm())
    before = next_logits(llm, TOKEN)
    fail(monkeypatch, lambda n: n < 4096)
    refused = apply(llm, Verb.MASK, (16, 300))
    assert refused.problem == "there is no memory for a context of 256 cells; the context is as it was"
    assert refused.cells == 0
    assert cells(llm) == 4096
    assert np.array_equal(next_logits(llm, TOKEN), before)


def test_no_memory_for_any_context_is_one_line_and_loses_nothing(open_llm, monkeypatch):
    llm = filled(open_llm())
    before = next_logits(llm, TOKEN)
    fail(monkeypatch, lambda n: True)
    assert "its content is in files" in apply(llm, Verb.MASK, (16, 300)).problem
    with pytest.raises(RuntimeError) as refused:
        llm.eval([TOKEN])
    assert "\n" not in str(refused.value)
    monkeypatch.undo()
    assert np.array_equal(next_logits(llm, TOKEN), before)


def test_no_disk_for_what_goes_leaves_everything(open_llm):
    llm = filled(open_llm())
    before = next_logits(llm, TOKEN)
    llm._ctx.resizer._place = llm._ctx.resizer._place._replace(reserve_bytes=1 << 60)
    assert "don't fit" in apply(llm, Verb.MASK, (16, 300)).problem
    assert np.array_equal(next_logits(llm, TOKEN), before)


def test_no_memory_to_grow_passes_over_what_was_parked_and_says_so(open_llm, monkeypatch):
    llm = filled(open_llm())
    apply(llm, Verb.PARK, (16, 300))
    fail(monkeypatch, lambda n: n > 256)
    said = llm.create_completion(PROMPT, max_tokens=3, temperature=0.0)
    assert said["psi_kv"]["masked_tokens"] == 284


# -- the compute buffer ----------------------------------------------------------------------------------


def all_rows(llm):
    """As a program does that decodes by itself and takes the logits of every token."""
    context, tokens = llm.ctx, llm.tokenize(PROMPT.encode())
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for at, token in enumerate(tokens):
        batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = token, at, 1, 1
        batch.seq_id[at][0] = 0
    assert llama_cpp.llama_decode(context, batch) == 0
    n_vocab = llm.n_vocab()
    rows = [
        np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, at), (n_vocab,))
        for at in range(len(tokens))
    ]
    out = np.array(rows)
    llama_cpp.llama_batch_free(batch)
    return out


def test_a_context_made_smaller_sets_no_memory_aside_for_logits_that_nobody_takes(open_llm):
    llm = filled(open_llm())
    assert not llm._ctx.resizer.outputs_limited  # the program's own is as the program asked
    apply(llm, Verb.PARK, (16, 300))
    assert llm._ctx.resizer.outputs_limited


def test_who_takes_the_address_can_have_the_logits_of_every_token(open_llm):
    expected = all_rows(open_llm())
    llm = filled(open_llm())
    apply(llm, Verb.PARK, (16, 300))
    assert len(expected) > 4  # more than a smaller context has rows for
    assert np.array_equal(all_rows(llm), expected)
    assert not llm._ctx.resizer.outputs_limited


def test_a_model_that_gives_pages_has_room_for_all_logits(open_llm):
    assert len(all_rows(open_llm(settings={"residence": "pages"}))) > 4
