"""The demo model: memory really returned, context really restored, and an unused cache that costs nothing."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from engine_help import (
    anonymous_bytes,
    assert_map_is_true,
    config,
    evict,
    greedy,
    logits_after,
    run_python,
    spill,
)

from fakes import FakeSource
from psi_kv_governor import GovernedLlama
from psi_kv_governor.store.mounts import memory_backed

pytestmark = pytest.mark.llama
N_TOKENS = 560
SETTINGS = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
"""One thread: two on a machine that does other work too may take ten times as long."""


def opened(model: Path, folder: Path, **arguments: object) -> GovernedLlama:
    place = {} if memory_backed(folder) else {"store_dir": str(folder)}
    return GovernedLlama(
        str(model), config=config(**place), source=FakeSource(), auto=False, **SETTINGS, **arguments
    )


@pytest.fixture(scope="module")
def text_tokens(demo_model) -> list[int]:
    """English, as tokens of the demo model."""
    vocabulary = llama_cpp.Llama(str(demo_model), vocab_only=True, verbose=False)
    text = "\n".join(pydoc_data.topics.topics.values())[:20_000]
    return vocabulary.tokenize(text.encode())[:N_TOKENS]


@pytest.fixture(scope="module")
def prefilled(demo_model, text_tokens, tmp_path_factory) -> Iterator[tuple]:
    """A governed context, a plain one, and the state of both after 560 tokens: prefill is what takes time."""
    governed = opened(demo_model, tmp_path_factory.mktemp("spill"))
    plain = llama_cpp.Llama(str(demo_model), flash_attn=True, **SETTINGS)
    plain.eval(text_tokens)
    yield governed, plain, plain.save_state()
    governed.close()
    plain.close()


@pytest.fixture
def pair(prefilled) -> tuple[GovernedLlama, llama_cpp.Llama]:
    """The two of them, with the same rows for the 560 tokens."""
    governed, plain, state = prefilled
    governed.load_state(state)
    plain.load_state(state)
    assert governed.governor.capabilities.spill.able
    return governed, plain


def test_a_governed_context_decodes_as_a_plain_one(prefilled, text_tokens):
    governed, plain, _ = prefilled
    for llm in (governed, plain):
        llm.reset()
        llm.eval(text_tokens[:64])
    np.testing.assert_array_equal(logits_after(governed, 100), logits_after(plain, 100))


@pytest.mark.parametrize(
    "holes", [((32, 540),), ((5, 100), (101, 102), (180, 350), (400, 559))], ids=["one hole", "several holes"]
)
def test_trimmed_and_restored_it_is_the_same_bit_for_bit(pair, holes):
    governed, plain = pair
    before = anonymous_bytes()
    returned = spill(governed, *holes)
    given_up = sum(stop - start for start, stop in holes) * governed._engine.cell_bytes
    if len(holes) == 1:
        assert returned >= 0.95 * given_up
        assert before - anonymous_bytes() >= 0.95 * given_up  # as the kernel sees it
    assert governed.governor.restore().missing == 0
    np.testing.assert_array_equal(logits_after(governed, 100), logits_after(plain, 100))
    assert_map_is_true(governed)


def test_what_is_decoded_meanwhile_does_not_change_what_comes_back(pair):
    governed, plain = pair
    spill(governed, (32, 540))
    governed.eval([5, 6, 7, 8])
    governed.governor.restore()
    governed.n_tokens = N_TOKENS
    np.testing.assert_array_equal(logits_after(governed, 100), logits_after(plain, 100))


def test_lost_tokens_are_recomputed_so_that_the_answer_stays(pair):
    governed, plain = pair
    evict(governed, (300, 350))
    assert governed.make_whole() == 0
    found, expected = logits_after(governed, 100), logits_after(plain, 100)
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    assert np.argmax(found) == np.argmax(expected)


def test_a_quantised_cache_comes_back_bit_for_bit_too(demo_model, text_tokens, tmp_path):
    kind = {"type_k": llama_cpp.GGML_TYPE_Q8_0, "type_v": llama_cpp.GGML_TYPE_Q8_0}
    governed = opened(demo_model, tmp_path, **kind)
    try:
        governed.eval(text_tokens[:160])
        never_trimmed = logits_after(governed, 100)
        governed.n_tokens = 160
        governed._ctx.kv_cache_seq_rm(-1, 160, -1)
        returned = spill(governed, (4, 80), (81, 159))
        assert (
            returned > 0.5 * 154 * governed._engine.cell_bytes
        )  # holes of 15 KB a tensor: three pages at most
        assert governed.governor.restore().missing == 0
        np.testing.assert_array_equal(logits_after(governed, 100), never_trimmed)
    finally:
        governed.close()


def test_a_chat_goes_on_after_a_trim(pair):
    governed, plain = pair
    prompt = [*plain._input_ids.tolist(), 100, 200]
    spill(governed, (32, 540))
    assert greedy(governed, prompt, 8) == greedy(plain, prompt, 8)
    assert governed.governor.status().holes == 0


OPEN = """
import sys
if sys.argv[3] == "late":
    import llama_cpp
from psi_kv_governor import GovernedLlama, GovernorConfig


def memory():
    words = [line.split() for line in open("/proc/self/status")]
    found = {word[0]: int(word[1]) << 10 for word in words if len(word) == 3 and word[2] == "kB"}
    return found["RssAnon:"], found["VmHWM:"]


import llama_cpp
before, _ = memory()
llm = GovernedLlama(sys.argv[1], n_ctx=int(sys.argv[2]), n_threads=1, verbose=False, auto=False)
after, peak = memory()
print(after - before, peak, llm.n_ctx() * llm._engine.cell_bytes)
"""


@pytest.mark.parametrize("import_order", ["first", "late"])
def test_a_large_context_costs_nothing_until_it_is_used(demo_model, import_order):
    small = [int(word) for word in run_python(OPEN, demo_model, 512, import_order).split()]
    large = [int(word) for word in run_python(OPEN, demo_model, 32_768, import_order).split()]
    added_bytes, peak_bytes, cache_bytes = large
    assert cache_bytes > 700 << 20
    assert added_bytes < 64 << 20
    if import_order == "first":  # else llama.cpp zeroes all of it once, before it can be returned
        assert peak_bytes - small[1] < 96 << 20
