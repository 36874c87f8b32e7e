"""What the tests of evicting share: a context of several sequences, and settings without a place to park."""

from __future__ import annotations

import ctypes

import numpy as np

from psi_kv_governor import GovernorConfig

TOKENS = [int(token) for token in np.random.default_rng(11).integers(3, 250, 3000)]
CELL_BYTES = 8192  # of LARGE
CONFIG = GovernorConfig(
    place="none", status_socket=False, sink_cells=16, window_cells=64, block_cells=16, floor_cells=64
)


class Context:
    """A llama_context with several sequences, used through llama.cpp's own functions."""

    def __init__(self, model: str, **settings: int) -> None:
        import llama_cpp

        self.api = llama_cpp
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            model.encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        chosen = {"n_ctx": 4096, "n_batch": 512, "n_ubatch": 64, "n_seq_max": 4, "kv_unified": True}
        for name, value in {
            **chosen,
            "n_threads": 1,
            "n_threads_batch": 1,
            "flash_attn_type": 1,
            **settings,
        }.items():
            setattr(params, name, value)
        self.ctx = llama_cpp.llama_init_from_model(self.model, params)
        self.memory = llama_cpp.llama_get_memory(self.ctx)

    def decode(self, tokens: list[int], position: int, sequence: int = 0) -> None:
        batch = self.api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position + i, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, i == len(tokens) - 1
        assert self.api.llama_decode(self.ctx, batch) == 0
        self.api.llama_batch_free(batch)

    def remove(self, start: int, stop: int, sequence: int = 0) -> None:
        assert self.api.llama_memory_seq_rm(self.memory, sequence, start, stop)

    def state(self) -> bytes:
        size = self.api.llama_state_get_size(self.ctx)
        buffer = (ctypes.c_uint8 * size)()
        return bytes(memoryview(buffer)[: self.api.llama_state_get_data(self.ctx, buffer, size)])

    def close(self) -> None:
        self.api.llama_free(self.ctx)
        self.api.llama_model_free(self.model)
