"""Run by test_vllm_pressure.py in a cgroup of its own: an engine whose cache is filled, and that goes on.

The model has two layers of chance weights whose rows are wide: 64 KiB a token, so that a few thousand tokens
fill a cache that a real model's would take minutes for. Lines of JSON on standard output.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path

LONG, FILLERS = 1024, 15


def make_model(folder: Path) -> Path:
    """Write the model once."""
    if (folder / "config.json").exists():
        return folder
    import torch

    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=64,
        num_key_value_heads=64,
        head_dim=64,
        vocab_size=1024,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


def say(**told: object) -> None:
    print(json.dumps({"time_s": time.monotonic(), **told}), flush=True)


def main() -> None:
    kind, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    from vllm import LLM, SamplingParams

    if kind == "governed":
        options["kv_transfer_config"] = {"kv_connector": "PsiKvConnector", "kv_role": "kv_both"}
    llm = LLM(
        model=str(make_model(folder)),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=2048,
        max_num_batched_tokens=1024,
        max_num_seqs=4,
        dtype="float32",
        disable_log_stats=True,
        **options,
    )
    chance = random.Random(1)

    def prompt(tokens: int) -> dict:
        return {"prompt_token_ids": [chance.randrange(3, 1024) for _ in range(tokens)]}

    def generate(prompts: list, tokens: int) -> list:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        return [list(out.outputs[0].token_ids) for out in llm.generate(prompts, sampling, use_tqdm=False)]

    kept = [prompt(LONG) for _ in range(FILLERS)]
    first = generate(kept, 8)
    say(event="filled", pid=os.getpid())
    idle = sys.stdin.readline().strip() == "idle"
    number = 0
    while not idle:
        number += 1
        generate([prompt(64), prompt(64)], 16)
        say(event="round", number=number)
        if number >= int(os.environ.get("ROUNDS", "1000000")) or not_wanted():
            break
    if idle:
        sys.stdin.readline()
    say(event="again", same=generate(kept, 8) == first)


def not_wanted() -> bool:
    """Whether a line came in meanwhile."""
    import select

    return bool(select.select([sys.stdin], [], [], 0)[0])


if __name__ == "__main__":
    main()
