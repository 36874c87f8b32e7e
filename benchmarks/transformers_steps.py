"""Time of a decoded token with a governed cache and with a stock one, step by step in turn.

    .venv-transformers/bin/python benchmarks/transformers_steps.py --tokens 2048 8192

A model of 8B's cache (32 layers, 8 heads of 128, 32 query heads) and little else, so that what differs
between the caches is most of the time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from psi_kv_governor.engines.transformers import GovernedCache
from psi_kv_governor.engines.transformers.versions import cache_argument
from psi_kv_governor.residence import find_place
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

KINDS = ("stock", "memory", "file")


def fill(cache: Any, model: Any, tokens: int, dtype: torch.dtype) -> None:
    """Put random states of so many tokens in `cache`, the same in each."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(cache, GovernedCache):
        cache.begin_forward()
    for layer in range(model.config.num_hidden_layers):
        states = torch.randn(2, 1, 8, tokens, 128, generator=generator).to(dtype)
        cache.update(states[0], states[1], layer)
    if isinstance(cache, GovernedCache):
        cache.end_forward()


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192], help="lengths of the context")
    parser.add_argument("--steps", type=int, default=20, help="steps of each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=256, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=32_768,
    )  # fmt: skip
    print("| type | tokens | stock, ms | memory, ms | file, ms | ratios |\n" + "| --- " * 6 + "|")
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for tokens in options.tokens:
            times: dict[str, list[float]] = {kind: [] for kind in KINDS}
            caches: dict[str, Any] = {"stock": DynamicCache(config=config)}
            for kind in KINDS[1:]:
                place, most = find_place().place, tokens + options.steps + 8
                caches[kind] = GovernedCache(model, place=place, backing=kind, max_cells=most)  # type: ignore[arg-type]
            for cache in caches.values():
                fill(cache, model, tokens, dtype)
            token = torch.tensor([[7]])
            for step in range(options.steps + 2):
                for kind in KINDS:
                    started = time.perf_counter()
                    model(token, **{cache_argument(): caches[kind]})
                    if step >= 2:  # after the first pages
                        times[kind].append(time.perf_counter() - started)
            medians = {kind: statistics.median(each) * 1e3 for kind, each in times.items()}
            ratios = ", ".join(f"{kind} {medians[kind] / medians['stock']:.2f}" for kind in KINDS[1:])
            cells = " | ".join(f"{medians[kind]:.0f}" for kind in KINDS)
            print(f"| {str(dtype).removeprefix('torch.')} | {tokens:,} | {cells} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
