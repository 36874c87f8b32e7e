"""A request that shares a prefix with what was given up never attends to a hole in silence."""

from __future__ import annotations

import numpy as np
import pytest
from engine_help import (
    RECOMPUTED,
    assert_map_is_true,
    evict,
    greedy,
    logits,
    logits_after,
    plain_twin,
    some_tokens,
    spill,
)
from llama_cpp import LlamaRAMCache
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from fakes import FakeSource
from psi_kv_governor import GovernedLlama
from psi_kv_governor.control import Mode
from psi_kv_governor.events import Recomputed, Restored

pytestmark = pytest.mark.llama
PROMPT = some_tokens(300)
MESSAGES = [{"role": "user", "content": "what is it that you are in? " * 12}]


def under_pressure(llm: GovernedLlama, source: FakeSource) -> None:
    """From now on the machine stalls, and the governor has seen it."""
    source.stall = 1.0
    llm.governor.step()
    assert llm.governor.status().mode is Mode.TRIMMING
    assert llm.governor.status().holes > 0


def relieved(llm: GovernedLlama, source: FakeSource) -> None:
    source.stall = 0.0
    llm.governor.step()


def complete(llm, prompt: list[int], *, stream: bool, **arguments) -> tuple[str, dict | None]:
    """The text of a completion, and its note on missing tokens; the note is on the last chunk only."""
    arguments = {"max_tokens": 12, "temperature": 0.0, **arguments}
    result = llm.create_completion(prompt, stream=stream, **arguments)
    chunks = list(result) if stream else [result]
    assert all("psi_kv" not in chunk for chunk in chunks[:-1])
    return "".join(chunk["choices"][0]["text"] for chunk in chunks), chunks[-1].get("psi_kv")


def chat(llm, *, stream: bool) -> tuple[str, dict | None]:
    result = llm.create_chat_completion(MESSAGES, max_tokens=12, temperature=0.0, stream=stream)
    chunks = list(result) if stream else [result]
    assert all("psi_kv" not in chunk for chunk in chunks[:-1])
    part = "delta" if stream else "message"
    text = "".join(chunk["choices"][0][part].get("content") or "" for chunk in chunks)
    return text, chunks[-1].get("psi_kv")


@pytest.mark.parametrize("stream", [False, True])
def test_spilled_tokens_of_a_shared_prefix_come_back(open_llm, stream):
    llm = open_llm()
    events = []
    llm.governor.subscribe(events.append)
    twin = plain_twin(llm)
    assert complete(llm, PROMPT, stream=stream) == complete(twin, PROMPT, stream=stream)
    spill(llm, (20, 100), (150, 200))
    longer = [*PROMPT, 7, 8, 9]
    assert complete(llm, longer, stream=stream) == complete(twin, longer, stream=stream)
    assert [event.cells for event in events if isinstance(event, Restored)] == [130]
    np.testing.assert_array_equal(logits(llm), logits(twin))


@pytest.mark.parametrize("stream", [False, True])
def test_lost_tokens_of_a_shared_prefix_are_recomputed(open_llm, stream):
    llm = open_llm(n_batch=64)
    events = []
    llm.governor.subscribe(events.append)
    twin = plain_twin(llm, n_batch=64)
    complete(llm, PROMPT, stream=stream), complete(twin, PROMPT, stream=stream)
    evict(llm, (20, 100), (150, 200))  # longer than a batch, and not a multiple of it
    longer = [*PROMPT, 7, 8, 9]
    for model in (llm, twin):
        assert complete(model, longer, stream=stream, max_tokens=1)[1] is None
    assert [event.cells for event in events if isinstance(event, Recomputed)] == [130]
    np.testing.assert_allclose(logits(llm), logits(twin), atol=RECOMPUTED)
    assert_map_is_true(llm)


def test_spilled_before_lost_and_lost_before_spilled(open_llm):
    llm = open_llm()
    twin = plain_twin(llm)
    llm.eval(PROMPT), twin.eval(PROMPT)
    spill(llm, (20, 60), (200, 230))
    evict(llm, (60, 90), (120, 150))
    assert llm.make_whole() == 0
    np.testing.assert_allclose(logits_after(llm, 5), logits_after(twin, 5), atol=RECOMPUTED)
    assert_map_is_true(llm)


def test_only_the_shared_prefix_is_made_whole(open_llm):
    llm = open_llm()
    llm.eval(PROMPT)
    spill(llm, (20, 60))
    events = []
    llm.governor.subscribe(events.append)
    assert complete(llm, [*PROMPT[:20], 5, 6], stream=False)[1] is None
    assert events == []  # nothing was brought back only to be cut off
    assert llm.governor.status().store_bytes == 0


@pytest.mark.parametrize("stream", [False, True])
def test_under_pressure_the_hole_stays_and_the_result_says_so(open_llm, source, stream):
    llm = open_llm(settings={"quiet_s": 1e6})
    complete(llm, PROMPT, stream=False)
    under_pressure(llm, source)
    missing = llm.governor.status().spilled_cells
    text, note = complete(llm, [*PROMPT, 7, 8, 9], stream=stream)
    assert text
    assert note["missing_tokens"] == missing
    assert 3 < note["affected_tokens"] < 20
    assert llm.governor.status().spilled_cells == missing
    relieved(llm, source)
    _, note = complete(llm, [*PROMPT[:200], 9, 9], stream=stream)
    assert note is None
    assert llm.governor.status().holes == 0


@pytest.mark.parametrize("stream", [False, True])
def test_chat_too_is_restored_when_calm_and_says_so_when_not(open_llm, source, stream):
    llm = open_llm(settings={"quiet_s": 1e6})
    twin = plain_twin(llm)
    assert chat(llm, stream=stream) == chat(twin, stream=stream)
    assert llm.governor.trim(1.0).spilled > 0
    assert chat(llm, stream=stream)[1] is None
    under_pressure(llm, source)
    text, note = chat(llm, stream=stream)
    assert text
    assert note["missing_tokens"] == llm.governor.status().spilled_cells


def test_without_headroom_for_them_they_stay_away(open_llm, source):
    llm = open_llm()
    llm.eval(PROMPT)
    spill(llm, (20, 220))
    source.limit_bytes = 100 << 20
    line = int(0.04 * source.limit_bytes)
    source.headroom_bytes = line + 200 * llm._engine.cell_bytes - 1
    llm.governor.step()
    assert llm.make_whole() == 200
    source.headroom_bytes += 100
    llm.governor.step()
    assert llm.make_whole() == 0


def test_a_continued_generation_is_made_whole_too(open_llm):
    llm = open_llm()
    twin = plain_twin(llm)
    llm.eval(PROMPT), twin.eval(PROMPT)
    spill(llm, (20, 100))
    for model in (llm, twin):
        assert next(model.generate([5, 6], reset=False, temp=0.0)) is not None
    np.testing.assert_array_equal(logits(llm), logits(twin))
    assert llm._engine.ledger.holes() == 0


def test_the_same_prompt_again_samples_from_fresh_logits(open_llm):
    llm = open_llm()
    first = greedy(llm, PROMPT, 1)
    evict(llm, (20, 60))
    assert greedy(llm, PROMPT, 1) == first
    spill(llm, (20, 60))
    assert greedy(llm, PROMPT, 1) == first


def test_speculative_decoding_gives_the_same_text(open_llm):
    def draft():
        return LlamaPromptLookupDecoding(num_pred_tokens=5)

    llm = open_llm(draft_model=draft())
    twin = plain_twin(llm, draft_model=draft())
    prompt = some_tokens(40) * 4  # repeats, so drafts are taken and refused
    for model in (llm, twin):
        model.create_completion(prompt, max_tokens=60, temperature=0.0)
    spill(llm, (20, 80))
    evict(llm, (90, 120))
    longer = [*prompt, 7, 8, 9]
    first = llm.create_completion(longer, max_tokens=60, temperature=0.0)
    assert first["choices"] == twin.create_completion(longer, max_tokens=60, temperature=0.0)["choices"]
    assert_map_is_true(llm)
    assert len(llm._engine.ledger) == llm.n_tokens


def test_log_probabilities_survive(open_llm):
    llm = open_llm(logits_all=True)
    twin = plain_twin(llm, logits_all=True)
    llm.eval(PROMPT), twin.eval(PROMPT)
    spill(llm, (20, 200))
    arguments = {"max_tokens": 5, "temperature": 0.0, "logprobs": 3}
    longer = [*PROMPT, 7, 8]
    assert (
        llm.create_completion(longer, **arguments)["choices"]
        == twin.create_completion(longer, **arguments)["choices"]
    )
    np.testing.assert_array_equal(llm._scores, twin._scores)


def test_answers_are_kept_in_llamas_own_cache(open_llm):
    llm = open_llm()
    llm.set_cache(LlamaRAMCache())
    twin = plain_twin(llm)
    first, _ = complete(llm, PROMPT, stream=False)
    complete(llm, some_tokens(50, seed=3), stream=False)
    llm.governor.trim(1.0)
    again, note = complete(llm, PROMPT, stream=False)  # from the cache
    assert (first, None) == (again, note)
    assert first == complete(twin, PROMPT, stream=False)[0]
    assert_map_is_true(llm)


@pytest.mark.parametrize("stream", [False, True])
def test_under_pressure_an_answer_is_given_and_not_cached(open_llm, source, stream):
    """A state with holes is not kept, nor is a copy of the whole context made in RAM that is short."""
    llm = open_llm(settings={"quiet_s": 1e6})
    cache = LlamaRAMCache()
    llm.set_cache(cache)
    complete(llm, PROMPT, stream=False)
    assert len(cache.cache_state) == 1
    under_pressure(llm, source)
    text, note = complete(llm, [*PROMPT, 7, 8, 9], stream=stream)
    assert text
    assert note["missing_tokens"] > 0
    assert len(cache.cache_state) == 1
    relieved(llm, source)
    note = complete(llm, [*PROMPT, 7, 8], stream=stream)[1]
    assert note == {"missing_tokens": 0, "affected_tokens": 1}  # the 7 was decoded beside holes, and stays so
    assert len(cache.cache_state) == 2


def test_calling_the_model_is_a_completion(open_llm, source):
    llm = open_llm(settings={"quiet_s": 1e6})
    llm(PROMPT, max_tokens=2)
    under_pressure(llm, source)
    assert llm([*PROMPT, 5], max_tokens=2)["psi_kv"]["missing_tokens"] > 0
