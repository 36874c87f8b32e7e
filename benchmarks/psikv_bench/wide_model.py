"""A model with the keys and values of an 8B Llama and next to nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from psi_kv_governor.errors import BadInputError

N_LAYER, N_HEAD_KV, HEAD_DIM = 32, 8, 128
CELL_BYTES = 2 * 2 * N_LAYER * N_HEAD_KV * HEAD_DIM
"""Of K and V in f16: 128 KiB."""
N_VOCAB = 259
_N_EMBD = 64
_N_FF = 64


def write_wide_model(path: Path, n_ctx: int) -> Path:
    """Write it to `path`, with random weights in Q8_0. Raises BadInputError without gguf."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise BadInputError("the model is written with gguf: pip install gguf") from None
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(_N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(_N_FF)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(N_VOCAB)
    writer.add_head_count(N_HEAD_KV)  # of queries as many: grouping changes nothing of the cache
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])
    writer.add_token_scores([0.0] * N_VOCAB)
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_token_types(kinds + [gguf.TokenType.BYTE] * 256)
    random = np.random.default_rng(1)
    for name, shape in _shapes().items():
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, dtype=np.float32))
            continue
        values = random.standard_normal(shape, dtype=np.float32) * shape[1] ** -0.5
        packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _shapes() -> dict[str, tuple[int, ...]]:
    rows = N_HEAD_KV * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (N_VOCAB, _N_EMBD),
        "output.weight": (N_VOCAB, _N_EMBD),
        "output_norm.weight": (_N_EMBD,),
    }
    for i in range(N_LAYER):
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm": (_N_EMBD,), "ffn_norm": (_N_EMBD,),
            "attn_q": (rows, _N_EMBD), "attn_k": (rows, _N_EMBD), "attn_v": (rows, _N_EMBD),
            "attn_output": (_N_EMBD, rows), "ffn_gate": (_N_FF, _N_EMBD), "ffn_up": (_N_FF, _N_EMBD),
            "ffn_down": (_N_EMBD, _N_FF),
        }  # fmt: skip
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes
