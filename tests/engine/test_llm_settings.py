"""A `Llama` with any settings: what they allow is done, bit for bit, and the rest is said."""

from __future__ import annotations

import llama_cpp
import numpy as np
import pytest
from engine_help import (
    SMALL,
    assert_map_is_true,
    evict,
    greedy,
    logits_after,
    plain_twin,
    some_tokens,
    spill,
)
from models import LLAMA, WIDE

from psi_kv_governor import GovernedLlama
from psi_kv_governor.engine.llama.context import Sequences
from psi_kv_governor.errors import BadInputError, EngineError
from psi_kv_governor.ledger import LIVE

pytestmark = pytest.mark.llama
TOKENS = some_tokens(300)


@pytest.mark.parametrize(
    "type_kv", [llama_cpp.GGML_TYPE_F16, llama_cpp.GGML_TYPE_Q8_0, llama_cpp.GGML_TYPE_Q4_0]
)
def test_several_holes_come_back_bit_for_bit(open_llm, type_kv):
    llm = open_llm(type_k=type_kv, type_v=type_kv)
    twin = plain_twin(llm, type_k=type_kv, type_v=type_kv)
    llm.eval(TOKENS), twin.eval(TOKENS)
    spill(llm, (3, 40), (41, 42), (90, 200), (210, 299))
    np.testing.assert_array_equal(
        logits_after(llm, 5) if llm.governor.restore().missing == 0 else None, logits_after(twin, 5)
    )


def test_what_was_decoded_meanwhile_is_cut_off_and_the_rest_is_as_it_was(open_llm):
    llm = open_llm()
    twin = plain_twin(llm)
    llm.eval(TOKENS), twin.eval(TOKENS)
    spill(llm, (20, 200))
    for token in some_tokens(40, seed=2):
        llm.eval([token])
    assert llm._engine.track.affected() == 40
    llm.governor.restore()
    llm.n_tokens = 300
    np.testing.assert_array_equal(logits_after(llm, 5), logits_after(twin, 5))
    assert llm._engine.track.affected() == 0


def test_releasing_alone_changes_no_logit(open_llm):
    """The rows of a hole are masked: whether they are there or zero makes no difference to the others."""
    llm, twin = open_llm(), open_llm()
    llm.eval(TOKENS), twin.eval(TOKENS)
    returned = spill(llm, (20, 200))
    assert returned > 0
    twin._engine.track.sequences.move(Sequences.MAIN, Sequences.PARKED, 20, 200)  # the rows stay
    np.testing.assert_array_equal(logits_after(llm, 5), logits_after(twin, 5))


@pytest.mark.parametrize("shape", [LLAMA, WIDE], ids=["small rows", "rows of 64 KiB"])
def test_without_flash_attention_only_k_is_returned(open_llm, shape):
    llm = open_llm(shape, flash_attn=False, n_ctx=256)
    twin = plain_twin(llm, flash_attn=False, n_ctx=256)
    able = llm.governor.capabilities
    assert able.spill.able
    assert "only K can be returned" in able.spill.why
    tokens = some_tokens(150)
    llm.eval(tokens), twin.eval(tokens)
    returned = spill(llm, (10, 140))
    assert (
        0
        < returned
        <= 130 * llm._engine.cell_bytes
        == 130 * shape.n_layer * shape.n_head_kv * shape.head_dim * 2
    )
    assert llm.governor.restore().missing == 0
    np.testing.assert_array_equal(logits_after(llm, 5), logits_after(twin, 5))


def test_a_small_context_works(open_llm):
    llm = open_llm(n_ctx=64)
    twin = plain_twin(llm, n_ctx=64)
    assert greedy(llm, TOKENS[:40], 20) == greedy(twin, TOKENS[:40], 20)
    spill(llm, (4, 50))
    assert llm.governor.restore().missing == 0
    llm.n_tokens = twin.n_tokens = 40
    np.testing.assert_array_equal(logits_after(llm, 5), logits_after(twin, 5))


def test_a_context_as_long_as_the_model_was_trained_for(open_llm):
    llm = open_llm(n_ctx=0)
    assert llm.n_ctx() == LLAMA.n_ctx
    llm.eval(TOKENS)
    evict(llm, (20, 200))
    assert llm.make_whole() == 0


def test_embeddings_are_left_as_they_are(tiny_model, open_llm, caplog):
    llm = open_llm(embedding=True)
    plain = llama_cpp.Llama(str(tiny_model(LLAMA)), embedding=True, flash_attn=True, **SMALL)
    texts = ["the first", "of all the others"]
    assert llm.create_embedding(texts)["data"] == plain.create_embedding(texts)["data"]
    assert "an embedding context keeps its cache for one batch only" in llm.governor.capabilities.spill.why
    assert [record.message for record in caplog.records if "embedding" in record.message]
    with pytest.raises(EngineError, match="embedding context"):
        llm.governor.trim()
    assert llm.governor.restore().cells == 0
    assert llm.make_whole() == 0


def test_what_would_undo_the_governor_is_refused(open_llm):
    llm = open_llm()
    llm.eval(TOKENS)
    for call in (
        lambda: llm._ctx.kv_cache_seq_shift(0, 0, -1, 5),
        lambda: llm._ctx.kv_cache_seq_cp(0, 1, 0, -1),
        lambda: llm._ctx.kv_cache_seq_keep(1),
    ):
        with pytest.raises(NotImplementedError):
            call()
    llm._ctx.kv_cache_seq_keep(0)
    assert llm._engine.ledger.count(LIVE) == 300


def test_a_range_removed_by_hand_is_lost(open_llm):
    llm = open_llm()
    llm.eval(TOKENS)
    spill(llm, (50, 100))
    assert llm._ctx.kv_cache_seq_rm(0, 60, 80)
    status = llm.governor.status()
    assert (status.live_cells, status.spilled_cells, status.lost_cells) == (250, 10, 40)
    assert llm.make_whole() == 0
    assert_map_is_true(llm)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"settings": {"policy": "nonsense"}}, "nonsense"),
        ({"settings": {"store_dir": "/proc/nothing/here"}}, "cannot spill to /proc/nothing/here"),
    ],
)
def test_bad_settings_are_refused(open_llm, arguments, words):
    with pytest.raises(BadInputError, match=words) as error:
        open_llm(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"GGUF", b"not a model at all" * 100])
def test_a_file_that_is_no_model_is_refused(tmp_path, content):
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInputError) as error:
        GovernedLlama(str(path))
    assert "\n" not in str(error.value)
