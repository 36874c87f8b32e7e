"""`import psi_kv_governor.auto` before `llama_cpp`: every `llama_cpp.Llama` of this process is governed.

Also those that a framework makes (LangChain, LlamaIndex, Haystack, outlines, guidance, llama_cpp.server).

Their completions get the key `psi_kv` where some of the context was masked; where a framework drops it,
`psi_kv_governor.auto.governor.last_result` has it.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from psi_kv_governor.cache import Engine
from psi_kv_governor.config import load_config
from psi_kv_governor.engines.llama import loader, process
from psi_kv_governor.governor import Governor

_log = logging.getLogger("psi_kv_governor")


def _start() -> Governor:
    loaded = loader.load()
    config = load_config()
    engine: Engine
    if loaded.why:
        _log.warning("models are not governed: %s", loaded.why)
        engine = process.NoEngine(loaded.why)
    else:
        engine = process.engine(process.prepare(config))
    started = Governor(engine, config=config, name="llama_cpp")
    if not loaded.why:
        _annotate(started)
        started.start()
    return started


def _annotate(started: Governor) -> None:
    import llama_cpp

    from psi_kv_governor.llama import annotated

    for name in ("create_completion", "create_chat_completion"):
        original = getattr(llama_cpp.Llama, name)

        @functools.wraps(original)
        def marked(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            return annotated(started, _original(*args, **kwargs))

        setattr(llama_cpp.Llama, name, marked)


governor: Governor = _start()
"""The one governor of this process' caches."""
