"""A context of llama.cpp's own, with the agent under it and no `llama_cpp.Llama` over it."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from psi_kv_governor.config import load_config
from psi_kv_governor.engines.llama import loader, process
from psi_kv_governor.errors import PsiKvError

PART = 1024
"""Tokens of a conversation that are decoded."""
BATCH = 512

_C = TypeVar("_C", bound="RawContext")


class RawContext:
    """A context manager. `settings` are the governor's.

    Raises PsiKvError where the model can't be run, or its cache not be parked.
    """

    def __init__(
        self, model: Path, n_ctx: int, threads: int, n_seq: int, *, unified: bool, **settings: Any
    ) -> None:
        self.config = load_config(status_socket=False, **settings)
        loaded = loader.load()
        self.chosen = process.prepare(self.config)
        if loaded.agent is None or not self.chosen.folder:
            raise PsiKvError(loaded.why or f"there is no place to park: {self.chosen.why}")
        import llama_cpp

        self.agent, self.api = loaded.agent, llama_cpp
        deaf = ctypes.cast(ctypes.CDLL(None).abs, llama_cpp.llama_log_callback)  # llama.cpp tells much
        llama_cpp.llama_log_set(deaf, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(model).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, BATCH, BATCH
        params.n_seq_max, params.kv_unified = n_seq, unified
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = 1
        begin_s = time.monotonic()
        self.ctx = llama_cpp.llama_init_from_model(self._model, params)
        self.open_s = time.monotonic() - begin_s
        if not self.ctx:
            raise PsiKvError(f"a context of {n_ctx:,} cells can't be made")
        self.memory = llama_cpp.llama_get_memory(self.ctx)

    def __enter__(self: _C) -> _C:
        return self

    def __exit__(self, *_: object) -> None:
        self.api.llama_free(self.ctx)
        self.api.llama_model_free(self._model)

    def decode(self, tokens: Sequence[int], start: int, sequence: int = 0) -> None:
        """Decode `tokens`, at most a batch, at the positions from `start` on. Raises PsiKvError."""
        batch = self.api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, start + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = i == len(tokens) - 1
        failed = self.api.llama_decode(self.ctx, batch)
        self.api.llama_batch_free(batch)
        if failed:
            raise PsiKvError("the model can't be decoded with")

    def read(self, tokens: Sequence[int], sequence: int) -> None:
        """Decode them from the beginning of a sequence."""
        for start in range(0, len(tokens), BATCH):
            self.decode(tokens[start : start + BATCH], start, sequence)
