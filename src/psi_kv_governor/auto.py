"""`import psi_kv_governor.auto` before `llama_cpp`: every `llama_cpp.Llama` of this process is governed.

Also those that a framework makes (LangChain, LlamaIndex, Haystack, outlines, guidance, llama_cpp.server).

Their completions get the key `psi_kv` where some of the context was masked; where a framework drops it,
`psi_kv_governor.auto.governor.last_result` has it.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Generator, Sequence
from typing import Any

from psi_kv_governor.cache import Engine
from psi_kv_governor.config import load_config
from psi_kv_governor.engines.llama import loader, process
from psi_kv_governor.engines.llama.engine import LlamaEngine
from psi_kv_governor.engines.llama.states import SavedStates, load
from psi_kv_governor.governor import Governor
from psi_kv_governor.healing import context_of, cut_for_request, heal
from psi_kv_governor.results import annotated

_log = logging.getLogger("psi_kv_governor")
_engines: weakref.WeakKeyDictionary[Any, LlamaEngine] = weakref.WeakKeyDictionary()
"""Of each `Llama` that has generated: an engine over its context alone."""


def _start() -> Governor:
    loaded = loader.load()
    config = load_config()
    engine: Engine
    if loaded.why:
        _log.warning("models are not governed: %s", loaded.why)
        engine = process.NoEngine(loaded.why)
    else:
        chosen = process.prepare(config)
        engine = process.engine(chosen)
        engine.states = states = SavedStates(chosen.place)
    started = Governor(engine, config=config, name="llama_cpp")
    if not loaded.why:
        _stand_before_requests(started, chosen)
        _keep_states(states)
        started.healers.append(lambda: sum(heal(llm, started, one) for llm, one in list(_engines.items())))
        started.start()
    return started


def _stand_before_requests(started: Governor, chosen: process.Chosen) -> None:
    import llama_cpp

    for name in ("create_completion", "create_chat_completion"):
        original = getattr(llama_cpp.Llama, name)

        @functools.wraps(original)
        def marked(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            return annotated(started, _original(*args, **kwargs))

        setattr(llama_cpp.Llama, name, marked)

    plain = llama_cpp.Llama.generate

    @functools.wraps(plain)
    def generate(llm: Any, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Any, None]:
        tokens = list(tokens)
        _before_request(llm, started, chosen, tokens)
        yield from plain(llm, tokens, *args, **kwargs)

    llama_cpp.Llama.generate = generate


def _keep_states(states: SavedStates) -> None:
    """States that are saved from now on (`LlamaRAMCache`) can be parked."""
    import llama_cpp

    save, load_plain = llama_cpp.Llama.save_state, llama_cpp.Llama.load_state

    @functools.wraps(save)
    def save_state(llm: Any) -> Any:
        saved = states.save(llm)
        return save(llm) if saved is None else saved

    @functools.wraps(load_plain)
    def load_state(llm: Any, state: Any) -> None:
        load(llm, state, functools.partial(load_plain, llm), states)

    llama_cpp.Llama.save_state, llama_cpp.Llama.load_state = save_state, load_state


def _before_request(llm: Any, started: Governor, chosen: process.Chosen, tokens: list[int]) -> None:
    """Nothing in here may reach the request: what fails is said in the log."""
    try:
        if llm not in _engines:
            _engines[llm] = process.engine(chosen, functools.partial(context_of, weakref.ref(llm)))
        cut_for_request(llm, started, _engines[llm], tokens)
    except Exception:
        _log.warning("a request goes on without the governor's preparation", exc_info=True)


governor: Governor = _start()
"""The one governor of this process' caches."""
