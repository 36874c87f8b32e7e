"""Queries and keys of a real model, read in another way than the code under test reads them."""

from __future__ import annotations

import ctypes

import numpy as np

F16, Q4_0, Q8_0 = 1, 2, 8  # enum ggml_type
TEXT = (
    "The lighthouse keeper wrote the number 4711 on the wall, went down the stairs, and forgot about it. "
    "Every evening ships passed by the rocks, and every evening the lamp was lit an hour before sunset. "
)


class Capture(ctypes.Structure):
    """`struct capture` of capture.c."""

    _fields_ = (
        ("layer", ctypes.c_int32),
        ("n_tokens", ctypes.c_int32),
        ("n_head", ctypes.c_int32),
        ("dim", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("queries", ctypes.c_float * (1 << 20)),
    )

    def taken(self) -> np.ndarray:
        """The queries of the newest graph, times the scale, shape (n_tokens, n_head, dim)."""
        shape = (self.n_tokens, self.n_head, self.dim)
        return np.ctypeslib.as_array(self.queries)[: np.prod(shape)].reshape(shape) * self.scale


def tokens_of(llm, count: int) -> list[int]:
    tokens = llm.tokenize((TEXT * 9).encode())
    assert len(tokens) >= count
    return tokens[:count]


def floats(rows: np.ndarray, kind: int) -> np.ndarray:
    """Rows as they lie in memory, shape (n, bytes), to (n, values)."""
    if kind == F16:
        return rows.copy().view(np.float16).astype(np.float64)
    blocks = rows.reshape(len(rows), -1, 34)
    scales = blocks[:, :, :2].copy().view(np.float16).astype(np.float64)
    return (scales * blocks[:, :, 2:].view(np.int8)).reshape(len(rows), -1)


def keys_of(llm, kind: int, n: int) -> np.ndarray:
    """The cached keys as llama.cpp saves them, shape (6 layers, n, 3 heads, 64)."""
    import llama_cpp

    size = llama_cpp.llama_state_seq_get_size(llm.ctx, 0)
    buffer = (ctypes.c_uint8 * size)()
    size = llama_cpp.llama_state_seq_get_data(llm.ctx, buffer, size, 0)
    saved = np.frombuffer(bytes(buffer)[:size], dtype=np.uint8)
    layer_bytes = 12 + n * {F16: 384, Q8_0: 204}[kind]  # its type and the length of a row stand before
    keys = saved[-12 * layer_bytes :][: 6 * layer_bytes].reshape(6, layer_bytes)[:, 12:]
    return np.stack([floats(layer.reshape(n, -1), kind).reshape(n, 3, 64) for layer in keys])


def attention_of(queries: np.ndarray, keys: np.ndarray, position: int, seen: np.ndarray) -> np.ndarray:
    """Softmax of one token's queries (heads, dim) over the keys (n, heads_kv, dim) of the positions `seen`
    up to its own, averaged over the heads; 1 is an equal share."""
    visible = seen <= position
    logits = np.einsum("hd,nhd->hn", queries, np.repeat(keys, len(queries) // keys.shape[1], axis=1))
    logits[:, ~visible] = -np.inf
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0) * visible.sum()
