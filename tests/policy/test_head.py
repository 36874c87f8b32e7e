"""The system prompt is found from the chat template, and is never given up."""

from __future__ import annotations

import pytest

from psi_kv_governor.ledger import LIVE
from psi_kv_governor.policy import Range

pytestmark = pytest.mark.llama

PIRATE = {
    "role": "system",
    "content": "You are a pirate of few words, and never say where the treasure is.",
}

HELLO = {"role": "user", "content": "Hello, who are you? " * 5}


def head_text(llm) -> str:
    text = llm.detokenize(llm._head, special=True).decode()
    return text.replace("▁", " ").removeprefix("<s>").lstrip()  # as the small model's vocabulary has it


def chat(llm, *messages, **arguments):
    return llm.create_chat_completion(list(messages), max_tokens=1, temperature=0.0, **arguments)


@pytest.mark.parametrize(
    ("template", "begins", "ends"),
    [("chatml", "<|im_start|>system\n", "user\n"), ("llama-2", "[INST] <<SYS>>\n", "<</SYS>>")],
)
def test_all_of_the_system_prompt_stays(open_llm, template, begins, ends):
    llm = open_llm("random", chat_format=template, n_ctx=2048, settings={"sink_cells": 4})
    chat(llm, PIRATE, HELLO)
    head = head_text(llm)
    assert head.startswith(begins)
    assert PIRATE["content"] in head
    assert head.endswith(ends)
    assert "Hello" not in head
    cells = len(llm._head)
    llm.governor.trim(1.0)
    live = list(llm._engine.ledger.ranges(LIVE))
    assert live[0] == Range(0, cells)
    assert len(live) == 2  # the head, and the recent window


def test_every_leading_system_message_counts(open_llm, demo_model):
    llm = open_llm(model=demo_model)
    chat(llm, PIRATE, HELLO)
    alone = len(llm._head)
    chat(llm, PIRATE, {**PIRATE, "content": "Be brief."}, HELLO)
    assert len(llm._head) > alone
    assert "Be brief." in head_text(llm)
    chat(llm, PIRATE, HELLO, PIRATE)  # a system message later on is no head
    assert len(llm._head) == alone


def test_a_template_with_a_system_prompt_of_its_own(open_llm, demo_model):
    llm = open_llm(model=demo_model)
    chat(llm, {"role": "user", "content": "Hi"})
    assert head_text(llm) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n"
    )
    assert llm.governor._chooser.head_cells == len(llm._head)


def test_a_request_that_begins_otherwise_is_not_protected(open_llm):
    llm = open_llm(chat_format="chatml", n_ctx=2048)
    chat(llm, PIRATE, HELLO)
    assert llm.governor._chooser.head_cells == len(llm._head) > 70
    llm.create_completion("the a of", max_tokens=1)
    common = llm.longest_token_prefix(llm._head, llm._input_ids.tolist())
    assert llm.governor._chooser.head_cells == common < 10
    chat(llm, PIRATE, HELLO)
    assert llm.governor._chooser.head_cells == len(llm._head)


def test_the_head_is_rendered_once_for_the_same_system_prompt(open_llm, monkeypatch):
    from psi_kv_governor.engine.llama import llm as module

    llm = open_llm(chat_format="chatml", n_ctx=2048)
    chat(llm, PIRATE, HELLO)
    monkeypatch.setattr(module, "head_of_chat", lambda *_, **__: pytest.fail("rendered again"))
    chat(llm, PIRATE, HELLO, {"role": "assistant", "content": "Arr."}, HELLO)


def test_a_handler_that_cannot_be_asked_leaves_the_sinks(open_llm):
    llm = open_llm(chat_format="chatml", n_ctx=2048)

    def handler(*, llama, messages, **_):
        if len(messages[-1]["content"]) == 1:
            raise RuntimeError("this is no conversation")
        return llama.create_completion("the a of", max_tokens=1)

    llm.chat_handler = handler
    assert chat(llm, PIRATE, HELLO)["usage"]["completion_tokens"] == 1
    assert llm._head == []


def test_tools_in_the_system_prompt_are_part_of_the_head(open_llm):
    llm = open_llm(chat_format="chatml", n_ctx=2048)
    seen = []

    def handler(*, llama, messages, tools=None, **_):
        seen.append(tools)
        prompt = f"{tools} {messages[-1]['content']}"
        return llama.create_completion(llama.tokenize(prompt.encode()), max_tokens=1)

    llm.chat_handler = handler
    tools = [{"type": "function", "function": {"name": "dig"}}]
    chat(llm, HELLO, tools=tools)
    assert seen == [tools] * 3
    assert "dig" in head_text(llm)
