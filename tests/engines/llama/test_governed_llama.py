"""`GovernedLlama`: an ordinary `llama_cpp.Llama`, whatever happens beside it."""

from __future__ import annotations

import functools
import inspect
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fakes import FakeSource
from gguf_models import LARGE, LLAMA
from psi_kv_governor import GovernedLlama
from psi_kv_governor.cache import Plan, Range, Step, Verb
from psi_kv_governor.engines.llama.options import LlamaOptions
from psi_kv_governor.errors import BadInputError, EngineError
from psi_kv_governor.healing import HEAL_AT_ONCE_CELLS
from psi_kv_governor.llama import begins_with_system

pytestmark = pytest.mark.llama
SMALL = {"n_ctx": 2048, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
SETTINGS = {
    "sink_cells": 16,
    "window_cells": 32,
    "block_cells": 16,
    "floor_cells": 32,
    "status_socket": False,
}
PROMPT = "the cat sat on the mat and it was " * 20
CHAT = [{"role": "system", "content": "be short " * 10}, {"role": "user", "content": "a question " * 30}]


@pytest.fixture
def open_llm(open_tiny):
    return functools.partial(open_tiny, SETTINGS, {**SMALL, "flash_attn": True})


@pytest.fixture
def plain(tiny_model):
    """Opens the same models without us (the agent is in the process, and nobody tells it anything)."""
    import llama_cpp

    return lambda shape=LARGE, **arguments: llama_cpp.Llama(str(tiny_model(shape)), **{**SMALL, **arguments})


def mask(llm: GovernedLlama, start: int, stop: int) -> None:
    (cache,) = llm.governor.engine.snapshot().caches
    step = Step(verb=Verb.MASK, cache=cache.id, sequence=0, ranges=(Range(start, stop),))
    assert llm.governor.engine.apply(Plan(steps=(step,))).masked == stop - start


def text_of(result: Any) -> str:
    return result["choices"][0]["text"]


# -- as upstream -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flash", [True, False])
def test_what_it_says_is_what_a_plain_model_says(open_llm, plain, flash):
    """Flash attention is off unless it is asked for, as upstream: texts and saved states stay the same."""
    ours, theirs = open_llm(flash_attn=flash), plain(flash_attn=flash)
    for prompt in (PROMPT, PROMPT + "and then", "something else"):
        arguments = {"max_tokens": 20, "temperature": 0.0}
        assert text_of(ours(prompt, **arguments)) == text_of(theirs(prompt, **arguments))


def test_the_default_is_upstream_s(open_llm, plain, tiny_model):
    llm = GovernedLlama(str(tiny_model(LLAMA)), auto=False, source=FakeSource(), **SMALL)
    assert llm.context_params.flash_attn_type == plain(LLAMA).context_params.flash_attn_type
    llm.close()


def test_the_options_that_a_type_checker_knows_are_upstream_s():
    import llama_cpp

    upstream = set(inspect.signature(llama_cpp.Llama.__init__).parameters) - {"self", "model_path", "kwargs"}
    assert set(LlamaOptions.__annotations__) == upstream


def test_signatures_are_upstream_s(open_llm):
    import llama_cpp

    for name in ("create_completion", "create_chat_completion", "generate"):
        ours, theirs = getattr(GovernedLlama, name), getattr(llama_cpp.Llama, name)
        assert inspect.signature(ours) == inspect.signature(theirs)


def test_a_state_of_a_plain_model_is_loaded_and_the_other_way_round(open_llm, plain):
    ours, theirs = open_llm(), plain(flash_attn=True)
    ours.eval(ours.tokenize(PROMPT.encode()))
    mask(ours, 20, 100)
    theirs.load_state(ours.save_state())
    ours.load_state(ours.save_state())
    arguments = {"max_tokens": 10, "temperature": 0.0}
    assert text_of(ours(PROMPT, **arguments)) == text_of(theirs(PROMPT, **arguments))


def test_it_is_pickled_with_its_settings(open_llm):
    llm = open_llm(settings={"floor_cells": 77})
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.governor.config.floor_cells == 77
    copy.close()


def test_a_file_that_is_no_model_is_refused_in_one_line(tmp_path):
    (tmp_path / "no.gguf").write_bytes(b"nothing")
    with pytest.raises(BadInputError) as refused:
        GovernedLlama(str(tmp_path / "no.gguf"), verbose=False)
    assert "\n" not in str(refused.value)


# -- messages --------------------------------------------------------------------------------------------


def test_a_generator_of_messages_reaches_the_model_whole(open_llm, plain):
    ours, theirs = open_llm(), plain(flash_attn=True)
    arguments = {"max_tokens": 5, "temperature": 0.0}
    one = ours.create_chat_completion((m for m in CHAT), **arguments)
    other = theirs.create_chat_completion((m for m in CHAT), **arguments)
    assert one["usage"] == other["usage"]
    assert one["choices"][0]["message"] == other["choices"][0]["message"]


def test_a_chat_handler_is_called_once_with_what_was_given_and_its_result_handed_on(open_llm):
    calls = []

    def handler(**arguments):
        calls.append(arguments["messages"])
        return SimpleNamespace(own="type")

    llm = open_llm()
    llm.chat_handler = handler
    given = [SimpleNamespace(role="user", content="an object")]
    assert llm.create_chat_completion(messages=given).own == "type"
    assert calls == [given]


def test_streamed_chunks_without_choices_pass_through(open_llm):
    llm = open_llm()
    llm.chat_handler = lambda **_: iter(
        [{"usage": 1}, {"choices": []}, {"choices": [{"finish_reason": "stop"}]}]
    )
    assert len(list(llm.create_chat_completion(CHAT, stream=True))) == 3


def test_the_head_of_a_chat_ends_with_its_first_turn(open_llm):
    llm = open_llm()
    llm._psi_kv_has_system = True
    end = llm.token_eos()
    list(zip(llm.generate([1, 7, 8, end, 9, 10, end, 11], temp=0.0), range(1), strict=False))
    assert llm.governor.engine.head_cells == 4


@pytest.mark.parametrize(
    ("messages", "has"),
    [(CHAT, True), (CHAT[1:], False), ([], False), ((m for m in CHAT), False), ([SimpleNamespace()], False)],
)
def test_only_what_can_be_looked_at_is_looked_at(messages, has):
    assert begins_with_system(messages) == has


# -- results ---------------------------------------------------------------------------------------------


def test_a_calm_result_has_nothing_added(open_llm):
    assert "psi_kv" not in open_llm()(PROMPT, max_tokens=4)


@pytest.mark.parametrize("stream", [False, True])
def test_a_result_says_what_it_was_computed_without(open_llm, stream):
    llm = open_llm()
    llm(PROMPT, max_tokens=1, temperature=0.0)
    mask(llm, 20, 120)
    result = llm(PROMPT + "and so", max_tokens=4, temperature=0.0, stream=stream)
    last = list(result)[-1] if stream else result
    assert last["psi_kv"]["masked_tokens"] == 100
    assert last["psi_kv"]["affected_tokens"] > 0
    assert llm.governor.last_result == last["psi_kv"]


def test_no_failure_of_ours_turns_a_finished_answer_into_an_exception(open_llm, plain, monkeypatch):
    text = text_of(plain()(PROMPT, max_tokens=3, temperature=0.0))
    for error in (EngineError("gone"), RuntimeError("a bug of ours"), MemoryError()):
        llm = open_llm()

        def fail(raised=error):
            raise raised

        monkeypatch.setattr(llm.governor.engine, "snapshot", fail)
        monkeypatch.setattr(llm.governor.engine, "first_affected", lambda _, raised=error: fail(raised))
        result = llm(PROMPT, max_tokens=3, temperature=0.0)
        assert (text_of(result), result["usage"]["completion_tokens"]) == (text, 3)


def test_a_ram_cache_under_pressure_loses_no_answer(open_llm):
    import llama_cpp

    llm = open_llm()
    llm.set_cache(llama_cpp.LlamaRAMCache())
    for i in range(4):
        answer = llm(PROMPT + "x" * i, max_tokens=3, temperature=0.0)
        assert answer["usage"]["completion_tokens"] == 3
        if i % 2:
            llm.governor.trim(0.5)


# -- trims, restores, healing ----------------------------------------------------------------------------


def test_after_trim_and_restore_it_goes_on_as_if_nothing_had_been(open_llm, plain):
    ours, theirs = open_llm(), plain(flash_attn=True)
    arguments = {"max_tokens": 10, "temperature": 0.0}
    ours(PROMPT, **arguments), theirs(PROMPT, **arguments)
    mask(ours, 20, 120)
    ours.governor.restore()
    more = PROMPT + "and then it went"
    assert text_of(ours(more, **arguments)) == text_of(theirs(more, **arguments))
    assert "psi_kv" not in ours(more, **arguments)


def test_what_was_decoded_without_some_of_the_context_is_healed_by_the_next_request(open_llm, plain):
    ours, theirs = open_llm(), plain(flash_attn=True)
    arguments = {"max_tokens": 8, "temperature": 0.0}
    first = ours(PROMPT, max_tokens=1, temperature=0.0)
    theirs(PROMPT, max_tokens=1, temperature=0.0)
    mask(ours, 20, 120)
    marked = ours(PROMPT + " and so", **arguments)
    assert marked["psi_kv"]["affected_tokens"] < HEAL_AT_ONCE_CELLS
    again = ours(PROMPT + " and so it goes on", **arguments)
    assert "psi_kv" not in again
    assert text_of(again) == text_of(theirs(PROMPT + " and so it goes on", **arguments))
    assert text_of(first)


def test_heal_by_hand_makes_the_context_whole(open_llm, plain):
    ours, theirs = open_llm(), plain(flash_attn=True)
    tokens = ours.tokenize(PROMPT.encode())
    for one in (ours, theirs):
        one.eval(tokens)
    mask(ours, 20, 120)
    ours.eval(tokens[:40])
    theirs.eval(tokens[:40])
    assert ours.heal() == 40
    assert ours.governor.engine.first_affected(0) is None
    import llama_cpp

    def logits(llm):
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),)).copy()

    np.testing.assert_allclose(logits(ours), logits(theirs), atol=0.05)


def test_trim_says_why_nothing_went(open_llm, running):
    llm = open_llm(settings={"floor_cells": 4000})
    assert llm.governor.trim().problem
    llm.eval(llm.tokenize(PROMPT.encode()))
    llm.governor.trim()  # pages of free cells, which flash attention read up to a multiple of 256
    assert "floor" in llm.governor.trim().problem


def test_under_pressure_the_loop_gives_up_and_later_restores(open_llm, running):
    source = FakeSource()
    llm = open_llm(source=source, settings={"quiet_s": 0.0, "cooldown_s": 0.0, "cooldown_acute_s": 0.0})
    llm.eval(llm.tokenize(PROMPT.encode()))
    source.stall = 1.0
    for _ in range(4):
        llm.eval([5])
        llm.governor.step()
    assert llm.governor.status().masked_cells > 0
    source.stall = 0.0
    for _ in range(400):
        llm.governor.step()
        if not llm.governor.status().masked_cells:
            break
    assert llm.governor.status().masked_cells == 0


def test_two_models_of_one_process_are_governed_apart(open_llm):
    one, other = open_llm(), open_llm()
    for llm in (one, other):
        llm.eval(llm.tokenize(PROMPT.encode()))
    mask(one, 20, 120)
    assert one.governor.status().masked_cells == 100
    assert other.governor.status().masked_cells == 0


def test_a_closed_model_is_quiet(open_llm):
    llm = open_llm()
    llm.eval(llm.tokenize(PROMPT.encode()))
    llm.close()
    llm.close()
    assert llm.governor.status().caches == ()
