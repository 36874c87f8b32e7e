"""Frameworks that make or use a `llama_cpp.Llama`: how each is opened, asked, and closed.

A subject opens with the path of a model and gives a function from prompt to text, and the `Llama` under it
where the framework has one to show. All of them decode greedily, with flash attention and one thread.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

MOST = 10
"""Tokens of an answer."""
COLOURS = ("red", "green", "blue")
FORM = f"({'|'.join(COLOURS)})( ({'|'.join(COLOURS)})){{20}}"
"""Longer than an answer."""
OPTIONS = {
    "n_ctx": 1024,
    "n_batch": 128,
    "n_threads": 1,
    "n_threads_batch": 1,
    "flash_attn": True,
    "verbose": False,
}
HANDED_ON: list[Any] = []
"""`psi_kv` of the results that a framework hands on whole."""
Opened = tuple[Callable[[str], str], Any]


def _llama(path: str) -> Any:
    import llama_cpp

    return llama_cpp.Llama(path, **dict(OPTIONS))


def plain(path: str, _: contextlib.ExitStack) -> Opened:
    llm = _llama(path)
    return lambda prompt: llm(prompt, max_tokens=MOST, temperature=0.0)["choices"][0]["text"], llm


def guidance(path: str, _: contextlib.ExitStack) -> Opened:
    from guidance import gen, models

    llm = _llama(path)
    model = models.LlamaCpp(llm, echo=False)
    return lambda prompt: (model + prompt + gen("answer", max_tokens=MOST, temperature=0.0))["answer"], llm


def langchain(path: str, _: contextlib.ExitStack) -> Opened:
    from langchain_community.llms import LlamaCpp

    options = {k: v for k, v in OPTIONS.items() if k not in {"n_threads_batch", "flash_attn"}}
    more = {"flash_attn": True, "n_threads_batch": 1}
    model = LlamaCpp(model_path=path, temperature=0.0, max_tokens=MOST, model_kwargs=more, **options)
    return model.invoke, model.client


def llama_index(path: str, _: contextlib.ExitStack) -> Opened:
    from llama_index.llms.llama_cpp import LlamaCPP

    options = {k: v for k, v in OPTIONS.items() if k not in {"n_ctx", "verbose"}}
    model = LlamaCPP(
        model_path=path,
        temperature=0.0,
        max_new_tokens=MOST,
        context_window=OPTIONS["n_ctx"],
        model_kwargs=options,
        verbose=False,
    )

    def complete(prompt: str) -> str:
        answer = model.complete(prompt, formatted=True)
        HANDED_ON.append((answer.raw or {}).get("psi_kv"))
        return answer.text

    return complete, model._model


def haystack(path: str, _: contextlib.ExitStack) -> Opened:
    from haystack.dataclasses import ChatMessage
    from haystack_integrations.components.generators.llama_cpp import LlamaCppChatGenerator

    model = LlamaCppChatGenerator(
        model=path, model_kwargs=dict(OPTIONS), generation_kwargs={"max_tokens": MOST, "temperature": 0.0}
    )
    model.warm_up()
    return lambda prompt: model.run([ChatMessage.from_user(prompt)])["replies"][0].text, model._model


def outlines(path: str, _: contextlib.ExitStack) -> Opened:
    import outlines

    llm = _llama(path)
    model = outlines.from_llamacpp(llm)
    form = outlines.regex(FORM)
    # Its own backend applies the form by numba, and without it lets any token pass.
    given = {"backend": "llguidance", "max_tokens": MOST, "temperature": 0.0}
    return lambda prompt: model(prompt, form, **given), llm


def lm_format_enforcer(path: str, _: contextlib.ExitStack) -> Opened:
    from llama_cpp import LogitsProcessorList
    from lmformatenforcer import RegexParser
    from lmformatenforcer.integrations.llamacpp import (
        build_llamacpp_logits_processor,
        build_token_enforcer_tokenizer_data,
    )

    llm = _llama(path)
    data = build_token_enforcer_tokenizer_data(llm)

    def complete(prompt: str) -> str:
        form = LogitsProcessorList([build_llamacpp_logits_processor(data, RegexParser("[a-z ]{12,40}"))])
        # It looks through the whole vocabulary for each token, for 0.2 s.
        made = llm(prompt, max_tokens=MOST // 3, temperature=0.0, logits_processor=form)
        return made["choices"][0]["text"]

    return complete, llm


def server(path: str, ends: contextlib.ExitStack) -> Opened:
    """`llama_cpp.server` as it is, asked by the openai client."""
    import openai
    import uvicorn
    from llama_cpp.server.app import create_app
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    app = create_app(server_settings=ServerSettings(), model_settings=[ModelSettings(model=path, **OPTIONS)])
    listening = socket.create_server(("127.0.0.1", 0))  # and kept: a port that is only looked up may be taken
    port = listening.getsockname()[1]
    running = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=running.run, args=([listening],), daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive(), "the server ended while it started"
        time.sleep(0.05)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

    def end() -> None:
        client.close()
        running.should_exit = True
        thread.join()

    ends.callback(end)

    def complete(prompt: str) -> str:
        made = client.completions.create(model="any", prompt=prompt, max_tokens=MOST, temperature=0.0)
        return made.choices[0].text

    return complete, None


SUBJECTS: dict[str, Callable[[str, contextlib.ExitStack], Opened]] = {
    "plain": plain,
    "guidance": guidance,
    "langchain": langchain,
    "llama_index": llama_index,
    "haystack": haystack,
    "outlines": outlines,
    "lm_format_enforcer": lm_format_enforcer,
    "llama_cpp.server": server,
}
