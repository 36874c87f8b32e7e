"""`GovernedLlama`: a `llama_cpp.Llama` whose KV cache gives memory back under pressure."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psi_kv_governor.cache import Engine
from psi_kv_governor.config import GovernorConfig, load_config
from psi_kv_governor.engines.llama import loader, process
from psi_kv_governor.engines.llama.engine import LlamaEngine
from psi_kv_governor.errors import EngineError
from psi_kv_governor.gguf_file import read_gguf
from psi_kv_governor.governor import Governor
from psi_kv_governor.policy import Policy
from psi_kv_governor.pressure.reading import PressureSource

LOADED = loader.load()  # the agent has to be there before llama_cpp

import llama_cpp  # noqa: E402

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from psi_kv_governor.engines.llama.options import LlamaOptions

_log = logging.getLogger("psi_kv_governor")
_SYSTEM_ROLES = frozenset({"system", "developer"})

HEAL_AT_ONCE_CELLS = 256
"""Tokens that a request decodes again by itself when it builds on some that were decoded while others were
masked: a quarter of a second of prefill on the demo model, two on an 8B model with four cores. More are
healed where they are no more than the request's own prompt has to decode anyway: then it at most doubles."""


class GovernedLlama(llama_cpp.Llama):  # type: ignore[misc]  # mypy here follows no import of llama_cpp
    """Takes every argument of `llama_cpp.Llama`, and has all of its methods.

    A result for which some of the context was masked, or that builds on tokens decoded while it was, has a
    key `psi_kv` with `masked_tokens` and `affected_tokens`.

    With `flash_attn=True` cells of a running conversation can be given up too; without it only caches that
    nobody is decoding with. Raises BadInputError when the model file or a setting can't be used.
    """

    governor: Governor

    def __init__(
        self,
        model_path: str,
        *,
        config: GovernorConfig | None = None,
        source: PressureSource | None = None,
        policy: Policy | None = None,
        auto: bool = True,
        **kwargs: Unpack[LlamaOptions],
    ) -> None:
        """`config`, `source` and `policy` are as in Governor; `auto=False` acts only by hand."""
        config = config or load_config()
        self._psi_kv_auto = auto
        self._psi_kv_has_system = False
        with process.opening:
            chosen: process.Chosen | None = None
            why = LOADED.why
            if not why:
                chosen = process.prepare(config)
            try:
                super().__init__(str(model_path), **kwargs)
            except ValueError:
                # Reading the head of a large model takes a good part of a second, so only when it failed.
                read_gguf(Path(model_path))
                raise
        engine: Engine
        if chosen is None:
            engine = process.NoEngine(why)
            _log.warning("this model is not governed: %s", why)
        else:
            engine = process.engine(chosen, self._psi_kv_context)
        self.governor = Governor(engine, config=config, source=source, policy=policy)
        if auto:
            self.governor.start()

    def _psi_kv_context(self) -> int:
        """Address of the llama_context, which upstream may replace; 0 when it is closed."""
        context = getattr(self._ctx, "ctx", None)
        return ctypes.cast(context, ctypes.c_void_p).value or 0 if context is not None else 0

    # -- requests ---------------------------------------------------------------------------------------

    if not TYPE_CHECKING:  # a checker sees upstream's signatures and results

        @functools.wraps(llama_cpp.Llama.generate)
        def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Any, None]:
            """As upstream's; what a request builds on is healed first, where there is room."""
            tokens = list(tokens)
            _before_request(self, tokens)
            yield from super().generate(tokens, *args, **kwargs)

        @functools.wraps(llama_cpp.Llama.create_completion)
        def create_completion(self, *args: Any, **kwargs: Any) -> Any:
            """As upstream's; the result has `psi_kv` where something was masked."""
            return annotated(self.governor, super().create_completion(*args, **kwargs))

        @functools.wraps(llama_cpp.Llama.create_chat_completion)
        def create_chat_completion(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
            """As upstream's; the result has `psi_kv` where something was masked."""
            self._psi_kv_has_system = begins_with_system(messages)
            return annotated(self.governor, super().create_chat_completion(messages, *args, **kwargs))

    def heal(self) -> int:
        """Decode the tokens again that were decoded while others were masked, if there is room.

        What is still masked is brought back first; while the machine is under pressure nothing is done. Runs
        in the thread that generates.

        Returns:
            The number of tokens decoded.
        """
        return _heal(self, self.n_tokens, self.n_tokens)

    # -- the end ----------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "config": self.governor.config, "auto": self._psi_kv_auto}

    def close(self) -> None:
        """Stop the governor and free the model."""
        if governor := self.__dict__.get("governor"):
            governor.close()
            governor.engine.close()
        if "_stack" in self.__dict__:
            super().close()


def begins_with_system(messages: Any) -> bool:
    """Whether a chat begins with a system prompt."""
    # Whatever upstream takes is looked at and nothing more: a generator is not begun, and what is no mapping
    # is not asked for attributes.
    if not isinstance(messages, Sequence) or not messages or not isinstance(messages[0], Mapping):
        return False
    return messages[0].get("role") in _SYSTEM_ROLES


def _before_request(llm: GovernedLlama, tokens: list[int]) -> None:
    """Nothing in here may reach the request: what fails is said once in the log."""
    try:
        engine = llm.governor.engine
        if isinstance(engine, LlamaEngine):
            engine.head_cells = _head(llm, tokens) if llm._psi_kv_has_system else 0
            kept = llm.longest_token_prefix(llm._input_ids.tolist(), tokens)
            _heal(llm, kept, max(HEAL_AT_ONCE_CELLS, len(tokens) - kept))
    except Exception:
        _log.warning("a request goes on without the governor's preparation", exc_info=True)


def _head(llm: GovernedLlama, tokens: list[int]) -> int:
    """Length of the system prompt with what the template puts around it: up to the first end of a turn."""
    vocabulary = llama_cpp.llama_model_get_vocab(llm.model)
    for i, token in enumerate(tokens):
        if i and llama_cpp.llama_vocab_is_eog(vocabulary, token):
            return i + 1
    return 0


def _heal(llm: GovernedLlama, length: int, most: int) -> int:
    """Have upstream decode the affected tail of the first `length` tokens again, if it has at most `most`.

    A sequence's tail can only be decoded again as a whole: it is cut before the first affected position, and
    the next evaluation does the rest.

    Returns:
        The number of tokens cut.
    """
    engine = llm.governor.engine
    if not isinstance(engine, LlamaEngine) or not length:
        return 0
    first = engine.first_affected(0)
    if first is None or first >= length or length - first > most:
        return 0
    if not llm.governor.has_room():
        return 0
    llm.governor.restore()
    if engine.masked(0):
        return 0  # it would only be affected again
    tokens = llm._input_ids[first:length].tolist()
    llm.n_tokens = first
    if length == most:  # by hand: now, and not with the next request
        llm.eval(tokens)
    return len(tokens)


def annotated(governor: Governor, result: Any) -> Any:
    """`result` of a completion, with `psi_kv` where it was computed without some of its context."""
    if isinstance(result, dict):
        return _annotate(governor, result)
    return _annotated_stream(governor, result) if isinstance(result, Iterator) else result


def _annotated_stream(governor: Governor, chunks: Iterator[Any]) -> Iterator[Any]:
    for chunk in chunks:
        choices = (chunk.get("choices") or []) if isinstance(chunk, dict) else []
        last = any(choice.get("finish_reason") for choice in choices)
        yield _annotate(governor, chunk) if last else chunk


def _annotate(governor: Governor, result: dict[str, Any]) -> dict[str, Any]:
    """Nothing in here may turn a finished answer into an exception."""
    try:
        snapshot = governor.engine.snapshot()
        sequences = [sequence for cache in snapshot.caches if cache.maskable for sequence in cache.sequences]
        masked = max((sequence.masked_cells for sequence in sequences), default=0)
        affected = max((sequence.affected for sequence in sequences), default=0)
        governor.last_result = {}
        if masked or affected:
            governor.last_result = {"masked_tokens": masked, "affected_tokens": affected}
            result["psi_kv"] = governor.last_result
    except EngineError:
        pass  # the model was closed while its answer was made
    except Exception:
        _log.warning("a result is not marked", exc_info=True)
    return result
