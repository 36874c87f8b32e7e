"""A program with a large cache of some kind; says how it fares line by line.

Run by the tests in a process of its own, since they look at the memory of the whole process or kill it.
The model is small, and its cache as wide as an 8B's: 32 layers of 8 heads of 128. In f32: half as many tokens
have the bytes that they have in bf16, which a processor without such instructions multiplies much slower.
"""

import sys
import time

import torch
from tiny import prompt, tiny_config, tiny_model, with_cache

from held_memory import held_bytes
from psi_kv_governor.engines.transformers.cache import GovernedCache
from psi_kv_governor.residence import find_place
from transformers import DynamicCache

CHUNK = 256
WARM = 256


def make(kind: str, model):
    if kind == "stock":
        return DynamicCache(config=model.config)
    return GovernedCache(model, place=find_place(reserve_bytes=0).place, backing=kind, max_cells=4096)


def main(kind: str, layers: int, tokens: int, steps: int) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    config = tiny_config(num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8, head_dim=128)
    model = tiny_model(dtype=torch.float32, config=config)
    ids = prompt(tokens)
    model(prompt(WARM), **with_cache(make(kind, model)))  # what libraries, and ours, take once for themselves
    before = held_bytes()
    cache = make(kind, model)
    for start in range(0, tokens, CHUNK):
        logits = model(ids[:, start : start + CHUNK], **with_cache(cache), logits_to_keep=1).logits
    print("filled", flush=True)
    if sys.stdin.readline().strip() == "gone":
        return
    chosen, times = [], []
    for _ in range(steps):
        token = logits[:, -1].argmax(-1, keepdim=True)
        chosen.append(int(token))
        started = time.perf_counter()
        logits = model(token, **with_cache(cache)).logits
        times.append(time.perf_counter() - started)
    print("resident", held_bytes() - before, flush=True)
    print("step_s", sorted(times)[len(times) // 2], flush=True)
    print("tokens", *chosen, flush=True)
