"""Tiny models of transformers with weights of their own, and what tests do with their caches."""

import torch

from psi_kv_governor.cache import Plan, Step
from psi_kv_governor.engines.transformers.cache import GovernedCache
from psi_kv_governor.engines.transformers.versions import cache_argument
from psi_kv_governor.residence import Place
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

VOCABULARY = 211
COUNT = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": VOCABULARY - 1}
RECALL_AHEAD = {"mode": "ahead", "sink_cells": 32, "window_cells": 64, "bytes_per_s": 1e9}


def tiny_config(kind: type[PretrainedConfig] = LlamaConfig, **changes) -> PretrainedConfig:
    return kind(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            **changes,
        }
    )


def tiny_model(attention: str = "sdpa", dtype: torch.dtype = torch.float32, config=None, seed: int = 1):
    torch.manual_seed(seed)
    config = config or tiny_config()
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    return model.eval()


def prompt(tokens: int, batch: int = 1, seed: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, tokens), generator=generator)


def with_cache(cache: GovernedCache) -> dict:
    return {cache_argument(): cache}


def next_logits(model, cache: GovernedCache, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of each of `tokens` [1, n], one at a time, as in decoding; the cache is as before afterwards."""
    logits = [model(tokens[:, i : i + 1], **with_cache(cache)).logits for i in range(tokens.shape[1])]
    cache.crop(-tokens.shape[1])
    return torch.cat(logits, dim=1)


def filled(model, place: Place | None, ids: torch.Tensor, **options) -> GovernedCache:
    """A cache with `ids` decoded in it."""
    cache = GovernedCache(model, place=place, **options)
    model(ids, **with_cache(cache))
    return cache


def do(engine, verb, cache, **limits):
    """Have the engine do one thing with a whole cache."""
    return engine.apply(Plan(steps=(Step(verb=verb, cache=cache.id),), **limits))


def wide_model(**changes):
    """Small, and with enough layers that summaries of one are less than 2 % of a cell."""
    return tiny_model(config=tiny_config(num_hidden_layers=8, num_attention_heads=2, head_dim=32, **changes))
