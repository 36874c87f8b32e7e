"""Run by test_vllm_texts.py in the environment of vLLM: the same prompts undisturbed, and while blocks are
parked or requests made to stand still at random. Prints one line of JSON."""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from vllm_scene import QUIET
from vllm_scene_child import make_model

# The scheduler's side is in reach of this script.
ONE_PROCESS = {**QUIET, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
PROMPTS, TOKENS = 40, 16
MOST_ROUNDS = 20
"""Of one disturbance: it comes at random, and on a busy machine few plans, or none, fall into a round."""
SHOWN_BYTES = 1 << 20


def prompts() -> list[str]:
    """Different ends on two long beginnings: some blocks are found again by hash, the last ones are not."""
    from pydoc_data.topics import topics

    words = topics["assignment"].split()
    starts = [" ".join(words[:100]), " ".join(words[300:390])]
    return [f"{starts[i % 2]} {' '.join(words[600 + 7 * i : 612 + 7 * i])}" for i in range(PROMPTS)]


def numbers() -> list[dict]:
    """The same of a model without a tokenizer. The second block of each is its own: when it ends, a free one
    that can be parked, while the first is nearly always used by somebody."""
    chance = random.Random(2)
    starts = [[chance.randrange(3, 1024) for _ in range(200)] for _ in range(2)]
    ends = [[chance.randrange(3, 1024) for _ in range(90)] for _ in range(PROMPTS)]
    return [{"prompt_token_ids": starts[i % 2] + end} for i, end in enumerate(ends)]


class Disturber(threading.Thread):
    """Gives random plans to the engine until it is stopped."""

    def __init__(self, engine, verb):
        super().__init__(daemon=True)
        self.engine, self.verb, self.random = engine, verb, random.Random(7)
        self.stopped = threading.Event()
        self.bytes_returned, self.preempted = 0, 0

    def run(self):
        while not self.stopped.is_set():
            self.one()
            self.stopped.wait(self.random.uniform(0.01, 0.1))
        for _ in range(200):  # nobody is left standing
            if not self.bring_back():
                return

    def one(self):
        from psi_kv_governor.cache import Plan, Step, Verb

        steps = [Step(verb=Verb.PARK, cache=0, sequence=0), Step(verb=Verb.RELEASE, cache=0)]
        if self.verb == "mask":
            steps = [Step(verb=Verb.MASK, cache=0, sequence=one.id) for one in self.running()]
            if self.random.random() < 0.5 and self.bring_back():
                return
        if steps:
            result = self.engine.apply(Plan(steps=(self.random.choice(steps),), deadline_s=10.0))
            self.bytes_returned += result.bytes_returned
            self.preempted += bool(result.masked)

    def shown(self):
        """Whether what it is for has happened."""
        return self.bytes_returned > SHOWN_BYTES and (self.preempted > 0 or self.verb != "mask")

    def running(self):
        caches = self.engine.snapshot().caches
        return [one for cache in caches for one in cache.sequences if one.preempt_order is not None]

    def bring_back(self):
        from psi_kv_governor.cache import Plan, Step, Verb

        masked = [one for cache in self.engine.snapshot().caches for one in cache.sequences if one.masked]
        if not masked:
            return False
        one = self.random.choice(masked)
        some = tuple(sorted(self.random.sample(one.masked, k=max(1, len(one.masked) // 2))))
        self.engine.apply(Plan(steps=(Step(verb=Verb.UNMASK, cache=0, sequence=one.id, ranges=some),)))
        return True


def main() -> None:
    os.environ.update(ONE_PROCESS)
    from vllm import LLM, SamplingParams

    options = json.loads(sys.argv[3] if len(sys.argv) > 3 else "{}")
    wide = bool(options.pop("wide", False))
    llm = LLM(
        model=str(make_model(Path(sys.argv[1]))) if wide else sys.argv[1],
        skip_tokenizer_init=wide,
        max_model_len=512,
        max_num_batched_tokens=512,
        max_num_seqs=4,
        dtype="float32",
        disable_log_stats=True,
        kv_transfer_config={"kv_connector": "PsiKvConnector", "kv_role": "kv_both"},
        **{"enforce_eager": True, **options},
    )
    governing = llm.llm_engine.engine_core.engine_core.scheduler.connector._scheduler
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=not wide)

    def texts():
        llm.reset_prefix_cache()
        return [
            out.outputs[0].token_ids
            for out in llm.generate(numbers() if wide else prompts(), sampling, use_tqdm=False)
        ]

    plain, told = texts(), {}
    for verb in sys.argv[2].split(","):
        disturber, started = Disturber(governing.engine, verb), time.monotonic()
        disturber.start()
        same = []
        while not same or not (disturber.shown() or len(same) == MOST_ROUNDS):
            same.append(sum(a == b for a, b in zip(plain, texts(), strict=True)))
        disturber.stopped.set()
        disturber.join(300)
        told[verb] = {
            "same": min(same),
            "of": len(plain),
            "rounds": len(same),
            "bytes_returned": disturber.bytes_returned,
            "preempted": disturber.preempted,
            "seconds": time.monotonic() - started,
            "ranks": len(governing.all.ranks),
        }
    print("TOLD " + json.dumps(told))


if __name__ == "__main__":
    main()
