"""`GovernedLlama`: a `llama_cpp.Llama` whose KV cache gives memory back under pressure."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from psi_kv_governor.config import GovernorConfig, load_config
from psi_kv_governor.engine.idle import IdleEngine
from psi_kv_governor.engine.llama import native
from psi_kv_governor.errors import EngineError
from psi_kv_governor.gguf_file import read_gguf
from psi_kv_governor.governor import Governor
from psi_kv_governor.ledger import LOST, SPILLED
from psi_kv_governor.policy.base import Policy, Range
from psi_kv_governor.pressure.reading import PressureSource
from psi_kv_governor.store.base import BlobTag, Store

LATE = native.load_before_llama_cpp()  # before llama_cpp, or new caches are not demand-paged

import llama_cpp  # noqa: E402
import numpy as np  # noqa: E402
from llama_cpp import _internals, llama_chat_format  # noqa: E402
from llama_cpp.llama import LlamaState  # noqa: E402

from psi_kv_governor.engine.llama.context import GovernedContext, Sequences  # noqa: E402
from psi_kv_governor.engine.llama.engine import LlamaEngine  # noqa: E402
from psi_kv_governor.engine.llama.head import head_of_chat, leading_system  # noqa: E402
from psi_kv_governor.engine.llama.opening import fingerprint, say_what_is_missing, why_ungovernable  # noqa: E402
from psi_kv_governor.engine.llama.selftest import prove, unable  # noqa: E402
from psi_kv_governor.engine.llama.tap import Tap  # noqa: E402

_log = logging.getLogger("psi_kv_governor")
_GENERATE = inspect.signature(llama_cpp.Llama.generate)


class GovernedLlama(llama_cpp.Llama):  # type: ignore[misc]  # llama_cpp is untyped
    """Takes every argument of `llama_cpp.Llama`, and has all of its methods.

    Flash attention is on unless it is refused by name: without it only K can be returned. A completion
    during which positions were missing, or that builds on tokens decoded while others were, has a key
    `psi_kv` with `missing_tokens` and `affected_tokens`.

    Raises BadInputError when the model file or a setting can't be used.
    """

    def __init__(
        self,
        model_path: str,
        *,
        config: GovernorConfig | None = None,
        source: PressureSource | None = None,
        policy: Policy | None = None,
        store: Store | None = None,
        auto: bool = True,
        **kwargs: Any,
    ) -> None:
        """`config`, `source`, `policy` and `store` are as in Governor; `auto=False` acts only by hand."""
        config = config or load_config()
        self._auto = auto
        self._engine: LlamaEngine | None = None
        self._tap: Tap | None = None
        self._ungovernable = why_ungovernable(kwargs)
        self._head: list[int] = []
        self._head_key = ""
        kwargs.setdefault("flash_attn", True)
        try:
            super().__init__(str(model_path), **kwargs)
        except ValueError:
            # Reading the head of a large model takes a good part of a second, so only when it failed.
            read_gguf(Path(model_path))
            raise
        engine = self._engine or IdleEngine(unable(self._ungovernable))
        self.governor = Governor(engine, config=config, source=source, policy=policy, store=store)
        say_what_is_missing(engine.capabilities, LATE)
        if auto:
            self.governor.start()

    # -- hooks into Llama.__init__: it makes the parameters, then the model, then the context ------------

    @property
    def context_params(self) -> llama_cpp.llama_context_params:
        return self.__dict__["context_params"]

    @context_params.setter
    def context_params(self, params: llama_cpp.llama_context_params) -> None:
        self.__dict__["context_params"] = params
        if self._ungovernable:
            return
        self._paged_before = native.load().library.psikv_demand_paged_bytes()
        self._tap = Tap(native.load())
        self._stack.callback(self._tap.close)  # the stack closes the context, which calls it, first
        params.n_seq_max = Sequences.COUNT
        params.kv_unified = True
        params.cb_eval = llama_cpp.ggml_backend_sched_eval_callback(native.load().eval_callback)
        params.cb_eval_user_data = self._tap.user_data
        params.abort_callback = llama_cpp.ggml_abort_callback(native.load().abort_callback)
        params.abort_callback_data = self._tap.user_data

    @property
    def _model(self) -> _internals.LlamaModel:
        return self.__dict__["_model"]

    @_model.setter
    def _model(self, model: _internals.LlamaModel) -> None:
        self.__dict__["_model"] = model
        looks = (
            llama_cpp.llama_model_is_recurrent,
            llama_cpp.llama_model_is_hybrid,
            llama_cpp.llama_model_n_swa,
        )
        if any(look(model.model) for look in looks):
            # Nothing can be parked there, and each sequence would cost a whole recurrent state, or a window.
            self.context_params.n_seq_max = 1

    @property
    def _ctx(self) -> _internals.LlamaContext:
        return self.__dict__["_ctx"]

    @_ctx.setter
    def _ctx(self, context: _internals.LlamaContext) -> None:
        self.__dict__["_ctx"] = context
        if self._tap is None:
            return
        proof = prove(context, self._tap)  # raises nothing: what it can't show can't be done
        if proof.rows is None:
            self._ungovernable = proof.able.release.why
            return
        if native.load().library.psikv_demand_paged_bytes() == self._paged_before:
            proof.rows.return_all()  # upstream zeroed the cache, and so made all of it resident
        self._engine = LlamaEngine(
            context,
            self._tap,
            proof.rows,
            proof.able,
            BlobTag(
                model=fingerprint(Path(self.model_path)),
                library=native.library_version(),
                layout=proof.rows.layout,
                start=0,
                stop=0,
            ),
        )
        GovernedContext.govern(context, self._engine)

    # -- requests ---------------------------------------------------------------------------------------

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Any, None]:
        """As `Llama.generate`; a shared prefix is made whole first, unless the machine is under pressure."""
        tokens = list(tokens)
        if self._engine is not None:
            self._engine.track.peak_holes = 0
            self.governor.protect_head(self.longest_token_prefix(self._head, tokens))
            goes_on = not _GENERATE.bind(self, tokens, *args, **kwargs).arguments.get("reset", True)
            kept = self.n_tokens if goes_on else self.longest_token_prefix(self._input_ids.tolist(), tokens)
            self.make_whole(kept)
        yield from super().generate(tokens, *args, **kwargs)

    def make_whole(self, length: int | None = None) -> int:
        """Restore and recompute what is missing of the first `length` positions (default all).

        Gives the number of positions still missing: while the machine is under pressure, or has no room
        for them, they stay away. Runs in the thread that generates; recomputing changes the logits.
        """
        engine = self._engine
        if engine is None:
            return 0
        prefix = Range(0, self.n_tokens if length is None else length)
        holes = engine.ledger.holes(prefix)
        if holes == 0 or not self.governor.has_room_for(holes):
            return holes
        spilled = sum(run.cells for run in engine.ledger.ranges(SPILLED, prefix))
        if spilled:
            self.governor.restore(spilled)
        self._recompute(engine, prefix)
        return engine.ledger.holes(prefix)

    def _recompute(self, engine: LlamaEngine, prefix: Range) -> None:
        begin, cells = time.monotonic(), 0
        try:
            while (lost := next(engine.ledger.ranges(LOST, prefix), None)) is not None:
                if engine.ledger.holes(Range(0, lost.start)):
                    break  # what came before could not be put back: decoding now would attend to a hole
                if not self.governor.has_room_for(lost.cells):
                    break  # memory became short meanwhile
                self._requires_eval = True  # the logits are those of the recomputed tokens from here on
                cells += engine.recompute(min(self.n_batch, lost.cells))
        except EngineError as error:
            _log.warning("%s", error)
        if cells:
            self.governor.recomputed(cells, time.monotonic() - begin)

    def create_completion(self, *args: Any, **kwargs: Any) -> Any:
        """As `Llama.create_completion`, with `psi_kv` added when positions were missing."""
        return self._annotate(super().create_completion(*args, **kwargs))

    def create_chat_completion(self, *args: Any, **kwargs: Any) -> Any:
        """As `Llama.create_chat_completion`, with `psi_kv` added when positions were missing.

        The system prompt is protected from now on, for as long as requests begin with it.
        """
        self._know_head(*args, **kwargs)
        return self._annotate(super().create_chat_completion(*args, **kwargs))

    def _know_head(
        self,
        messages: Sequence[Any],
        functions: Any = None,
        _call: Any = None,
        tools: Any = None,
        *_: Any,
        **__: Any,
    ) -> None:
        """Find the tokens of the system prompt, unless they are those of the request before."""
        system = leading_system(messages)
        key = repr((system, functions, tools))
        if self._engine is None or key == self._head_key:
            return
        handler = (
            self.chat_handler
            or self._chat_handlers.get(self.chat_format)
            or llama_chat_format.get_chat_completion_handler(self.chat_format)
        )
        self._head = head_of_chat(self, handler, system, functions=functions, tools=tools)
        self._head_key = key

    def _annotate(self, result: Any) -> Any:
        if not isinstance(result, dict):
            return self._annotate_stream(result)
        if self._engine is not None:
            missing, affected = self._engine.track.peak_holes, self._engine.track.affected()
            if missing or affected:
                result["psi_kv"] = {"missing_tokens": missing, "affected_tokens": affected}
        return result

    def _annotate_stream(self, chunks: Iterator[Any]) -> Iterator[Any]:
        for chunk in chunks:
            last = isinstance(chunk, dict) and any(choice.get("finish_reason") for choice in chunk["choices"])
            yield self._annotate(chunk) if last else chunk

    # -- state ------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """As `Llama.reset`, which clears the cache of a hybrid model at once."""
        if self._engine is None or not self._is_hybrid:
            super().reset()
            return
        with self._engine.emptied_upstream():
            super().reset()

    def save_state(self) -> LlamaState:
        """As `Llama.save_state`. Raises EngineError when positions are missing that can't be put back now."""
        if self._engine is None:
            return super().save_state()
        self.make_whole()
        with self._engine.guard.hold():
            if missing := self._still_missing(self._engine):
                raise EngineError(
                    f"{missing} tokens are not in the cache: save the state when the pressure is over"
                )
            state = super().save_state()
            state.positions_by_cell = self._engine.track.by_cell()
        return state

    def _still_missing(self, engine: LlamaEngine) -> int:
        """Positions missing at a safe point. What went since the context was made whole is put back."""
        holes = engine.ledger.holes()
        if holes and self.governor.has_room_for(holes):
            engine.restore(holes)
        return engine.ledger.holes()

    @property
    def cache(self) -> Any:
        """The cache of states (`set_cache`). None while positions are missing that can't be put back now: a
        state with holes is not kept, nor a copy of the whole context made in memory that is short."""
        holes = self._engine.ledger.holes() if self._engine is not None else 0
        return self.__dict__["cache"] if not holes or self.governor.has_room_for(holes) else None

    @cache.setter
    def cache(self, cache: Any) -> None:
        self.__dict__["cache"] = cache

    def load_state(self, state: LlamaState) -> None:
        if self._engine is None:
            super().load_state(state)
            return
        with self._engine.emptied_upstream():
            try:
                super().load_state(state)
            except BaseException:
                self.n_tokens = 0  # the cache is empty: what it says it has must not be built upon
                raise
            # A state of a plain Llama has its cells in the order of its positions; `loaded` checks that.
            by_cell = getattr(state, "positions_by_cell", np.arange(state.n_tokens))
            self._engine.track.loaded(by_cell, state.input_ids[: state.n_tokens])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "config": self.governor.config, "auto": self._auto}

    def close(self) -> None:
        """Stop the governor, forget what is in the store, and free the model."""
        if governor := self.__dict__.get("governor"):
            governor.close()
        if engine := self.__dict__.get("_engine"):
            engine.close()
        if "_stack" in self.__dict__:
            super().close()
