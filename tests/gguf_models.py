"""Tiny GGUF models with random weights: one of each kind of cache that the engine meets.

They say nothing sensible, but llama.cpp runs them like any other, a thousand tokens a second and more. The
weights come from a fixed seed, so a file is the same bytes every time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

FIRST_BYTE_TOKEN = 3
N_BYTE_TOKENS = 256
WORDS = ("▁the", "▁a", "▁of", "▁to", "▁and", "▁in", "▁is", "▁it", "▁you", "▁that", "▁he", "▁was", "▁for")
N_VOCAB = FIRST_BYTE_TOKEN + N_BYTE_TOKENS + len(WORDS)


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. One cell is `2 * n_layer * n_head_kv * head_dim` values."""

    arch: str
    n_embd: int = 64
    n_layer: int = 3
    n_head: int = 2
    n_head_kv: int = 1
    head_dim: int = 64
    n_ff: int = 96
    n_ctx: int = 4096
    window: int = 0
    """Width of the sliding window; 0 for a model without one."""
    state_layers: tuple[int, ...] = ()
    """Layers that keep one recurrent state instead of a cache."""


LLAMA = Shape("llama")
LARGE = Shape("llama", n_layer=4, n_head=8, n_head_kv=8)
"""8 KiB a cell in f16: a context of 4,096 cells has 32 MiB."""
WIDE = Shape("llama", n_layer=2, n_head=128, n_head_kv=128, head_dim=256)
"""A cell of 128 KiB of K: more than the headers that llama.cpp saves with it."""
MAMBA = Shape("mamba", n_layer=2, state_layers=(0, 1))
HYBRID = Shape("jamba", n_head=2, n_head_kv=1, head_dim=32, state_layers=(0, 2))
LARGE_HYBRID = Shape("jamba", n_embd=512, n_head=8, n_head_kv=8, head_dim=64, n_layer=4, state_layers=(0,))
SLIDING = Shape("gemma3", n_layer=6, window=64)
LARGE_SLIDING = Shape("gemma3", n_head=16, n_head_kv=16, n_layer=6, window=64)


def write_model(path: Path, shape: Shape, seed: int = 1) -> Path:
    """Write a model of `shape` to `path`."""
    writer = gguf.GGUFWriter(path, shape.arch)
    _write_sizes(writer, shape)
    _write_vocabulary(writer)
    random = np.random.default_rng(seed)
    for name, n_rows, n_columns in _tensors(shape):
        writer.add_tensor(name, _weights(random, name, n_rows, n_columns))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_sizes(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_name(f"tiny-{shape.arch}")
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(N_VOCAB)
    if shape.arch == "mamba":
        writer.add_head_count(0)
    else:
        writer.add_head_count(shape.n_head)
        heads = [0 if i in shape.state_layers else shape.n_head_kv for i in range(shape.n_layer)]
        writer.add_head_count_kv(heads if shape.state_layers else shape.n_head_kv)
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
        writer.add_rope_dimension_count(shape.head_dim)
    if shape.window:
        writer.add_sliding_window(shape.window)
    if shape.state_layers:
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_inner_size(2 * shape.n_embd)
        writer.add_ssm_state_size(8)
        writer.add_ssm_time_step_rank(4)


def _write_vocabulary(writer: gguf.GGUFWriter) -> None:
    """SentencePiece with byte tokens: any text has tokens."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(N_BYTE_TOKENS)), *WORDS]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * N_BYTE_TOKENS + [gguf.TokenType.NORMAL] * len(WORDS)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _tensors(shape: Shape) -> Iterator[tuple[str, int, int]]:
    """(name, rows, columns) of every tensor in numpy's order; 0 rows for a vector."""
    yield "token_embd.weight", N_VOCAB, shape.n_embd
    yield "output_norm.weight", 0, shape.n_embd
    yield "output.weight", N_VOCAB, shape.n_embd  # tied to the embedding it would only repeat the last token
    for i in range(shape.n_layer):
        for name, n_rows, n_columns in _layer(shape, i):
            yield f"blk.{i}.{name}", n_rows, n_columns


def _layer(shape: Shape, index: int) -> Iterator[tuple[str, int, int]]:
    yield "attn_norm.weight", 0, shape.n_embd
    yield from _state(shape) if index in shape.state_layers else _attention(shape)
    if shape.arch != "mamba":
        yield "ffn_norm.weight", 0, shape.n_embd
        yield "ffn_gate.weight", shape.n_ff, shape.n_embd
        yield "ffn_up.weight", shape.n_ff, shape.n_embd
        yield "ffn_down.weight", shape.n_embd, shape.n_ff
    if shape.arch == "gemma3":
        yield "post_attention_norm.weight", 0, shape.n_embd
        yield "post_ffw_norm.weight", 0, shape.n_embd
        yield "attn_q_norm.weight", 0, shape.head_dim
        yield "attn_k_norm.weight", 0, shape.head_dim


def _attention(shape: Shape) -> Iterator[tuple[str, int, int]]:
    n_q, n_kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    yield "attn_q.weight", n_q, shape.n_embd
    yield "attn_k.weight", n_kv, shape.n_embd
    yield "attn_v.weight", n_kv, shape.n_embd
    yield "attn_output.weight", shape.n_embd, n_q


def _state(shape: Shape) -> Iterator[tuple[str, int, int]]:
    n_inner, n_state, rank = 2 * shape.n_embd, 8, 4
    yield "ssm_in.weight", 2 * n_inner, shape.n_embd
    yield "ssm_conv1d.weight", n_inner, 4
    yield "ssm_conv1d.bias", 0, n_inner
    yield "ssm_x.weight", rank + 2 * n_state, n_inner
    yield "ssm_dt.weight", n_inner, rank
    yield "ssm_dt.bias", 0, n_inner
    yield "ssm_a", n_inner, n_state
    yield "ssm_d", 0, n_inner
    yield "ssm_out.weight", shape.n_embd, n_inner
    if shape.arch == "jamba":
        yield "ssm_dt_norm.weight", 0, rank
        yield "ssm_b_norm.weight", 0, n_state
        yield "ssm_c_norm.weight", 0, n_state


def _weights(random: np.random.Generator, name: str, n_rows: int, n_columns: int) -> np.ndarray:
    if "norm" in name:
        return np.ones(n_columns, dtype=np.float32)
    if name.endswith("ssm_a"):  # the state must fade: A is negative
        return -np.exp(random.standard_normal((n_rows, n_columns))).astype(np.float32)
    # Unit variance in, unit variance out: logits then depend on every token, near or far.
    scale = 1.0 if name.startswith("token_embd") else n_columns**-0.5
    values = random.standard_normal((n_rows, n_columns) if n_rows else n_columns, dtype=np.float32) * scale
    if name.startswith("output.weight"):
        # Never the most likely: Llama waits for the rest of a character, and the rest may never come.
        values[FIRST_BYTE_TOKEN + 0x80 : FIRST_BYTE_TOKEN + 0x100] = 0.0
    # Convolutions and vectors have to be f32.
    is_matrix = n_rows and "conv1d" not in name and not name.startswith("token_embd")
    return values.astype(np.float16 if is_matrix else np.float32)


def write_shallow(path: Path, source: Path, n_layer: int) -> Path:
    """Write the model `source` with the first of its layers only: its words and templates, and no sense.

    A token of the demo model takes a fifth of the time with 6 of its 30 layers.
    """
    reader = gguf.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, arch)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind, *inner = field.types
        value = n_layer if name == f"{arch}.block_count" else field.contents()
        writer.add_key_value(name, value, kind, inner[-1] if inner else None)
    for tensor in reader.tensors:
        if not tensor.name.startswith("blk.") or int(tensor.name.split(".")[1]) < n_layer:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
