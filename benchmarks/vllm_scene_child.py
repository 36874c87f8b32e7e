"""Run by vllm_scene.py in a cgroup of its own: an engine whose cache is filled, and that goes on.

The model has two layers of chance weights whose rows are wide: 64 KiB a token, so that a few thousand tokens
fill a cache that a real model's would take minutes for. Lines of JSON on standard output.
"""

from __future__ import annotations

import json
import random
import select
import sys
import time
from pathlib import Path
from typing import Any

LONG, FILLERS = 1024, 15
"""Prompts that fill the cache: tokens of each, and how many."""
SHORT, REQUESTS, DECODED = 64, 2, 16
"""A round of the work that goes on: tokens of a prompt, requests at a time, tokens that each decodes."""
OPTIONS = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_batched_tokens": 1024,
    "max_num_seqs": 4,
}


def make_model(folder: Path) -> Path:
    """Write the model once."""
    if (folder / "config.json").exists():
        return folder
    import torch

    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=64,
        num_key_value_heads=64, head_dim=64, vocab_size=1024, max_position_embeddings=4096,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


def say(**told: object) -> None:
    """A line."""
    print(json.dumps({"time_s": time.monotonic(), **told}), flush=True)


class Engine:
    """vLLM, in this process or with a core of its own."""

    def __init__(self, kind: str, folder: Path, options: dict[str, Any]) -> None:
        from vllm import LLM

        if kind == "governed":
            options["kv_transfer_config"] = {"kv_connector": "PsiKvConnector", "kv_role": "kv_both"}
        self._llm = LLM(model=str(make_model(folder)), disable_log_stats=True, **{**OPTIONS, **options})
        self._chance = random.Random(1)

    def prompt(self, tokens: int) -> dict[str, list[int]]:
        """A prompt that nobody had before."""
        return {"prompt_token_ids": [self._chance.randrange(3, 1024) for _ in range(tokens)]}

    def generate(self, prompts: list[dict[str, list[int]]], tokens: int) -> list[list[int]]:
        """Greedy."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        answers = self._llm.generate(prompts, sampling, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in answers]


def work(engine: Engine, number: int) -> None:
    """A round."""
    started = time.monotonic()
    engine.generate([engine.prompt(SHORT) for _ in range(REQUESTS)], DECODED)
    seconds = time.monotonic() - started
    say(event="round", number=number, tokens=REQUESTS * DECODED, seconds=seconds)


def main() -> None:
    """Fill the cache; go on until a line comes; ask the first prompts again."""
    kind, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    engine = Engine(kind, folder, options)
    kept = [engine.prompt(LONG) for _ in range(FILLERS)]
    first = engine.generate(kept, 8)
    say(event="filled")
    wanted = sys.stdin.readline().strip()
    if wanted == "idle":
        sys.stdin.readline()
    elif wanted == "calm":
        while (line := sys.stdin.readline().strip()) in {"one", "again"}:
            if line == "one":
                work(engine, number=0)
            else:
                say(event="again", same=engine.generate(kept, 8) == first)
    else:
        number = 0
        while not select.select([sys.stdin], [], [], 0)[0]:
            number += 1
            work(engine, number)
    say(event="again", same=engine.generate(kept, 8) == first)


if __name__ == "__main__":
    main()
