"""`GovernedLlama`: a `llama_cpp.Llama` whose KV cache gives memory back under pressure."""

from __future__ import annotations

import functools
import logging
import sys
import weakref
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psi_kv_governor.cache import Domain, Engine
from psi_kv_governor.config import GovernorConfig, load_config
from psi_kv_governor.engines.llama import loader, process
from psi_kv_governor.engines.llama.engine import LlamaEngine
from psi_kv_governor.engines.llama.states import SavedStates, load
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.gguf_file import read_gguf
from psi_kv_governor.governor import Governor
from psi_kv_governor.healing import context_of, cut_for_request, heal
from psi_kv_governor.kernel.filters import killing_calls
from psi_kv_governor.policy import Policy
from psi_kv_governor.pressure.reading import PressureSource
from psi_kv_governor.results import annotated

LOADED = loader.load()  # the agent has to be there before llama_cpp

import llama_cpp  # noqa: E402

from psi_kv_governor.engines.llama.resize import opening  # noqa: E402
from psi_kv_governor.engines.llama.resize.context import ResizableContext  # noqa: E402
from psi_kv_governor.engines.llama.resize.engine import ResizingEngine  # noqa: E402

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from psi_kv_governor.engines.llama.options import LlamaOptions

_log = logging.getLogger("psi_kv_governor")
_SYSTEM_ROLES = frozenset({"system", "developer"})
_HEALED = LlamaEngine, ResizingEngine


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
        self._psi_kv_states: SavedStates | None = None
        self._psi_kv_config = config
        with process.opening:
            chosen: process.Chosen | None = None
            why, before = LOADED.why, 0
            if not why:
                chosen = process.prepare(config)
                before = process.newest_buffer()
            try:
                super().__init__(str(model_path), **kwargs)
            except ValueError:
                # Reading the head of a large model takes a good part of a second, so only when it failed.
                read_gguf(Path(model_path))
                raise
            engine = self._psi_kv_engine(chosen, before, why)
        self.governor = self._psi_kv_governor(engine, config, source, policy)

    def _psi_kv_governor(
        self, engine: Engine, config: GovernorConfig, source: PressureSource | None, policy: Policy | None
    ) -> Governor:
        """Its governor; one that does nothing where the machine lets it do nothing. Raises BadInputError."""
        if not killing_calls():
            try:
                if source is None and engine.describe().domain is Domain.DEVICE:
                    source = process.Unseen("nothing: the cache is in a device's own memory")
                governor = Governor(engine, config=config, source=source, policy=policy)
                governor.healers.append(functools.partial(_heal_weakly, weakref.ref(self)))
                if self._psi_kv_auto:
                    governor.start()
                return governor
            except BadInputError:
                raise
            except Exception as error:  # no thread, no descriptor: the model is not to suffer for it
                _log.warning("this model is not governed: %s", error)
                engine = process.NoEngine(f"the governor can't be started: {error}")
        return Governor(engine, config=config, source=process.Unseen("nothing"), policy=policy)

    def _psi_kv_engine(self, chosen: process.Chosen | None, before: int, why: str) -> Engine:
        """The engine for where this model's cache is; `before` is the newest buffer from before it."""
        engine: Engine | None = None
        if chosen is not None:
            engine, why = opening.resizing_engine(self, process.buffers_after(before), chosen.folder)
            if engine is None and not why:
                engine = process.engine(chosen, functools.partial(context_of, weakref.ref(self)))
                self._psi_kv_states = engine.states = SavedStates(chosen.place)
        if engine is None:
            engine = process.NoEngine(why)
            _log.warning("this model is not governed: %s", why)
        return engine

    # Read by upstream at the very moment when it makes the context.
    @property
    def context_params(self) -> Any:
        """As upstream."""
        params = self.__dict__["context_params"]
        if "_model" in self.__dict__ and "_ctx" not in self.__dict__:
            opening.make_resizable(self._model.model, params, self._psi_kv_config)
        return params

    @context_params.setter
    def context_params(self, params: Any) -> None:
        self.__dict__["context_params"] = params

    @property
    def ctx(self) -> Any:
        """As upstream. Whoever takes this address may use it at any moment: the context then stays."""
        if sys._getframe(1).f_globals.get("__name__") != "llama_cpp.llama":
            opening.pin(self._ctx)
        return self._ctx.ctx

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

        @functools.wraps(llama_cpp.Llama.sample)
        def sample(self, *args: Any, **kwargs: Any) -> int:
            """As upstream's; no other context comes between the logits and the token."""
            with opening.still(self._ctx):
                token = super().sample(*args, **kwargs)
                opening.taken(self._ctx, last=kwargs.get("idx") in {None, self.n_tokens - 1})
            return token

    def save_state(self) -> Any:
        """As upstream. The bytes lie in a mapping of their own, and are parked when memory is short."""
        if isinstance(self._ctx, ResizableContext):
            with self._ctx.lock:
                self._ctx.make_whole()
                return super().save_state()
        saved = self._psi_kv_states.save(self) if self._psi_kv_states is not None else None
        return super().save_state() if saved is None else saved

    def load_state(self, state: Any) -> None:
        """As upstream, but a state that does not fit leaves the model empty and usable.

        Raises:
            StateMismatchError: it is of another model or kind of cache; a RuntimeError, as upstream's.
        """
        with opening.replaced(self._ctx):
            load(self, state, super().load_state, self._psi_kv_states)

    def heal(self) -> int:
        """As `governor.heal()`. Runs in the thread that generates."""
        engine = self.governor.engine
        return heal(self, self.governor, engine) if isinstance(engine, _HEALED) else 0

    # -- the end ----------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "config": self.governor.config, "auto": self._psi_kv_auto}

    def close(self) -> None:
        """Stop the governor and free the model."""
        if governor := self.__dict__.get("governor"):
            governor.close()
            opening.leave(self.__dict__.get("_ctx"))
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
    """Nothing in here may reach the request: what fails is said in the log."""
    try:
        engine = llm.governor.engine
        if isinstance(engine, _HEALED):
            engine.head_cells = _head(llm, tokens) if llm._psi_kv_has_system else 0
            cut_for_request(llm, llm.governor, engine, tokens)
    except Exception:
        _log.warning("a request goes on without the governor's preparation", exc_info=True)


def _heal_weakly(llm: weakref.ref[GovernedLlama]) -> int:
    alive = llm()
    return 0 if alive is None else alive.heal()


def _head(llm: GovernedLlama, tokens: list[int]) -> int:
    """Length of the system prompt with what the template puts around it: up to the first end of a turn."""
    vocabulary = llama_cpp.llama_model_get_vocab(llm.model)
    for i, token in enumerate(tokens):
        if i and llama_cpp.llama_vocab_is_eog(vocabulary, token):
            return i + 1
    return 0
