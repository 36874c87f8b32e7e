"""Our policies and kvpress' presses side by side, on one model of transformers and the same contexts.

    .venv-transformers/bin/python benchmarks/transformers_policies.py --out data/bench-transformers

Each contender drops a share of each context (blocks of 16 positions, sinks and recent window protected for
all alike), then the same continuation is read: how far the distributions of the next tokens moved from those
of the whole context (mean KL divergence, nats), and how much less likely a fact from the context became when
it is asked for (nats a token). Afterwards the context is put back bit for bit for the next contender.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean
from typing import Any

import torch

import transformers
from psi_kv_governor import model as models
from psi_kv_governor.engines.transformers import GovernedCache, KvpressPolicy, TransformersEngine
from psi_kv_governor.engines.transformers.kvpress import WORKING
from psi_kv_governor.engines.transformers.versions import cache_argument
from psi_kv_governor.policy import POLICIES, get_policy
from psi_kv_governor.policy.random import Random
from psi_kv_governor.policy.select import Protection, select
from psi_kv_governor.residence import find_place
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = ("exprlists", "class", "try", "import", "numeric-types", "specialnames")
FACTS = (
    ("The number of the locker in the port is", " 7421"),
    ("Margaret hid the silver key under the", " piano"),
    ("The train to Lisbon leaves from platform", " nine"),
)
"""What is asked, and the answer: both together are in the context."""
DEPTHS = (0.2, 0.5, 0.8)
PROTECTION = Protection(sink_cells=32, window_cells=64)
CONTINUED, LATE, BLOCK = 48, 96, 16


class Reader:
    """One context in a governed cache, and what the model makes of it."""

    def __init__(self, model: Any, engine: TransformersEngine, context: torch.Tensor, place: Any) -> None:
        self._model = model
        self.cache = GovernedCache(model, place=place, max_cells=4096)
        engine.add(self.cache)
        self.evidence = engine.evidence(self.cache.id, 0)
        self.evidence.watch.collect(frozenset({"attention"}), every_layer=True)
        self._read(context[:, :-LATE])
        self._read(context[:, -LATE:])  # of these the late queries are known
        self.length = context.shape[1]

    def _read(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model(ids, **{cache_argument(): self.cache}).logits
        return logits[0].log_softmax(dim=-1)

    def goes_on(self, ids: torch.Tensor) -> torch.Tensor:
        """Log-probabilities after each of `ids` [1, n], which are taken back afterwards."""
        found = self._read(ids)
        self.cache.crop(-ids.shape[1])
        return found

    def choose(self, policy: Any, share: float) -> Any:
        """What of the context `policy` gives up: before anything that follows the context was read."""
        live: Any = self.cache.places.live  # the old and the new Range are the same to a policy
        evidence: Any = self.evidence
        cells = round(self.length * share)
        return select(
            policy, live, self.length, evidence, cells=cells, protection=PROTECTION, block_cells=BLOCK
        )

    def drop(self, chosen: Any) -> None:
        """Mask these ranges of the context."""
        _, problem = self.cache.take_out(chosen, keep=True)
        if problem:
            raise SystemExit(problem)


def contenders() -> Iterator[tuple[str, list[Any]]]:
    """Names, and the policies whose mean each row is."""
    for name in POLICIES:
        yield name, [Random(seed=seed) for seed in range(3)] if name == "random" else [get_policy(name)]
    for press in WORKING:
        if press != "RandomPress":
            yield f"kvpress:{press}", [KvpressPolicy(press)]


def contexts(tokenizer: Any, tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]:
    """Context, its continuation, a question with its answer, and how many tokens the answer has."""
    for number, name in enumerate(TEXTS):
        question, answer = FACTS[number % len(FACTS)]
        ids = tokenizer(topics[name], add_special_tokens=False).input_ids
        ids = (ids * (1 + (tokens + CONTINUED) // len(ids)))[: tokens + CONTINUED]
        at = round(tokens * DEPTHS[number % len(DEPTHS)])
        told = tokenizer(f"\n{question}{answer}.\n", add_special_tokens=False).input_ids
        asked = tokenizer(f"\n{question}", add_special_tokens=False).input_ids
        said = tokenizer(answer, add_special_tokens=False).input_ids
        context = [*ids[:at], *told, *ids[at:tokens]]
        yield (*(torch.tensor([it]) for it in (context, ids[tokens:], [*asked, *said])), len(said))


def main() -> None:
    """Run all, print the table, and keep the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="length of each context")
    parser.add_argument("--drop", type=float, nargs="+", default=[0.5, 0.75], help="shares to drop")
    parser.add_argument("--out", type=Path, help="folder for the record")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    path = models.demo_model_path()
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(**where)
    place = find_place().place
    engine = TransformersEngine(place)
    rows: dict[tuple[str, float], list[tuple[float, float]]] = {}
    started = time.monotonic()
    for context, continuation, question, n_answer in contexts(tokenizer, options.tokens):
        reader = Reader(model, engine, context, place)
        choices = {
            (name, share): [reader.choose(policy, share) for policy in policies]
            for share in options.drop
            for name, policies in contenders()
        }
        whole = reader.goes_on(continuation)
        known = fact_nats(reader.goes_on(question), question, n_answer)
        for contender, each in choices.items():
            found = []
            for chosen in each:
                reader.drop(chosen)
                moved = reader.goes_on(continuation)
                kl = float((whole.exp() * (whole - moved)).sum(-1).mean())
                found.append((kl, fact_nats(reader.goes_on(question), question, n_answer) - known))
                reader.cache.put_back(reader.cache.places.masked)
            rows.setdefault(contender, []).append(
                (fmean(kl for kl, _ in found), fmean(it for _, it in found))
            )
        if not torch.equal(reader.goes_on(continuation), whole):
            raise SystemExit("the context is not what it was")
        reader.cache.close()
        print(f"{len(rows[next(iter(rows))])} of {len(TEXTS)} contexts", file=sys.stderr)
    record = {
        "model": path.name,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "tokens": options.tokens,
        "seconds": round(time.monotonic() - started),
        "rows": [
            {
                "name": name,
                "dropped": share,
                "kl": [kl for kl, _ in each],
                "fact_lost": [it for _, it in each],
            }
            for (name, share), each in rows.items()
        ],
    }
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "policies.json").write_text(json.dumps(record, indent=1) + "\n")
    print(table(record, options.drop))


def fact_nats(found: torch.Tensor, question: torch.Tensor, n_answer: int) -> float:
    """Mean surprise at the answer's tokens, the last of `question` [1, n]."""
    tokens = question[0, -n_answer:]
    before = found[-n_answer - 1 : -1]  # what was expected before each of them
    return -float(before.gather(1, tokens[:, None]).mean())


def table(record: dict[str, Any], shares: list[float]) -> str:
    """Markdown, the smallest divergence first."""
    mean = {
        (row["name"], row["dropped"]): [fmean(row[it]) for it in ("kl", "fact_lost")]
        for row in record["rows"]
    }
    names = sorted({name for name, _ in mean}, key=lambda name: mean[name, shares[0]][0])
    heads = [f"{head} at {share:.0%}" for share in shares for head in ("KL", "fact lost")]
    lines = ["| contender | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for name in names:
        cells = [f"{number:.3f}" for share in shares for number in mean[name, share]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
