"""A context longer than anybody would wait for: a part is decoded once, and copied to the places behind it.

What stands in the cells does not matter to what a token costs; how many there are does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from psi_kv_governor.cache import CacheState, Plan, Range, SequenceState, Step, Verb, cells_in
from psi_kv_governor.config import load_config
from psi_kv_governor.engines.llama import loader, process
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.sandbox.text import prompt_text

PART = 1024
"""Tokens that are decoded."""
_BATCH = 512


class LongContext:
    """One conversation of many copies of a part, in a context of its own. A context manager.

    Raises PsiKvError where the model can't be run, or its cache not be parked.
    """

    def __init__(self, model: Path, n_ctx: int, threads: int) -> None:
        self.config = load_config(status_socket=False)
        loaded = loader.load()
        chosen = process.prepare(self.config)
        if loaded.agent is None or not chosen.folder:
            raise PsiKvError(loaded.why or f"there is no place to park: {chosen.why}")
        import llama_cpp

        self._api: Any = llama_cpp
        deaf = ctypes.cast(ctypes.CDLL(None).abs, llama_cpp.llama_log_callback)  # llama.cpp tells much
        llama_cpp.llama_log_set(deaf, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(model).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, _BATCH, _BATCH
        params.n_seq_max, params.kv_unified = 2, True  # the second one is what is copied from
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = 1
        self._ctx = llama_cpp.llama_init_from_model(self._model, params)
        if not self._ctx:
            raise PsiKvError(f"a context of {n_ctx:,} cells can't be made")
        self.engine = process.engine(chosen, lambda: ctypes.cast(self._ctx, ctypes.c_void_p).value or 0)
        self.n_tokens = 0
        self._text = self._tokens(PART)

    def __enter__(self) -> LongContext:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._api.llama_free(self._ctx)
        self._api.llama_model_free(self._model)

    def _tokens(self, count: int) -> list[int]:
        vocab = self._api.llama_model_get_vocab(self._model)
        text = prompt_text(8 * count).encode()
        found = (self._api.llama_token * (4 * len(text)))()  # a space is three bytes to some
        n = self._api.llama_tokenize(vocab, text, len(text), found, len(found), True, False)
        return list(found[: min(n, count)])

    def decode(self, tokens: Sequence[int], sequence: int = 0) -> None:
        """Decode `tokens` at once. Raises PsiKvError where that fails."""
        batch = self._api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, self.n_tokens + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = i == len(tokens) - 1
        failed = self._api.llama_decode(self._ctx, batch)
        self._api.llama_batch_free(batch)
        if failed:
            raise PsiKvError("the model can't be decoded with")
        self.n_tokens += len(tokens)

    def fill(self, count: int) -> None:
        """Have `count` tokens, a multiple of PART, in the context. Raises PsiKvError where that fails."""
        for start in range(0, PART, _BATCH):
            self.decode(self._text[start : start + _BATCH], sequence=1)
        size = self._api.llama_state_seq_get_size(self._ctx, 1)
        state = (ctypes.c_uint8 * size)()
        self._api.llama_state_seq_get_data(self._ctx, state, size, 1)
        memory = self._api.llama_get_memory(self._ctx)
        for first in range(0, count, PART):
            if not self._api.llama_state_seq_set_data(self._ctx, state, size, 1):
                raise PsiKvError("a state can't be loaded")
            self._api.llama_memory_seq_add(memory, 1, 0, -1, first)
            self._api.llama_memory_seq_cp(memory, 1, 0, -1, -1)
            self._api.llama_memory_seq_rm(memory, 1, -1, -1)
        self.n_tokens = count

    def decode_singly(self, count: int) -> None:
        """Decode `count` tokens one by one."""
        for number in range(count):
            self.decode([self._text[number % PART]])

    def cache(self) -> CacheState:
        """The cache."""
        (cache,) = self.engine.snapshot().caches
        return cache

    def sequence(self) -> SequenceState:
        """The conversation."""
        return next(one for one in self.cache().sequences if one.id == 0)

    def mask(self, part: Range) -> None:
        """Give `part` up. Raises PsiKvError for less."""
        step = Step(verb=Verb.MASK, cache=self.cache().id, sequence=0, ranges=(part,))
        done = self.engine.apply(Plan(steps=(step,)))
        if done.problem or done.masked != cells_in([part]):
            raise PsiKvError(done.problem or f"{done.masked} of {part.cells} cells were given up")
