"""What the plugin costs while nothing is short: rounds of a stock and of a governed vLLM in turn.

    .venv-vllm/bin/python benchmarks/vllm_calm.py --rounds 100 --record calm.json
    .venv-vllm/bin/python benchmarks/vllm_calm.py --model wide --rounds 100 --record calm-wide.json

The first with the demo model, the second with one that computes next to nothing: a step's fixed cost by
itself. Both engines are there all the time, one works. Of times only a quiet machine says anything: see the
load it records. What the engines' threads worked and how often a page had to be brought in is told apart
from that.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import NamedTuple

from psi_kv_governor.engines.vllm.http import descendants
from psi_kv_governor.quantile import quantile
from psi_kv_governor.sandbox.sandbox import Sandbox
from vllm_scene import KINDS, Engine, Where, keep, load_average, scheduled

WARM_ROUNDS = 5
LIMIT_BYTES = 4 << 30


class Record(Where, kw_only=True):
    """All rounds."""

    model: str
    load: float
    tokens: int
    """Decoded in a round."""
    seconds: dict[str, list[float]]
    """By kind, of each round."""
    ratio: float
    """Throughput of governed over stock, by the medians: 1 is no cost."""
    ratio_low: float
    """The same of the pairs that stood beside each other: a twentieth is below."""
    ratio_high: float
    processor_s: dict[str, float]
    """By kind, what all threads of the engine worked in a round (the median)."""
    processor_ratio: float
    """Of these, stock over governed."""
    faults: dict[str, float]
    """By kind, page faults in a round (the mean)."""


class Used(NamedTuple):
    """What the processes of an engine used in a round, or have used so far."""

    seconds: float
    processor_s: float
    faults: int


def used(pid: int) -> Used:
    """So far, by each process below `pid`: proc_pid_stat(5)."""
    ran_s, faults = 0.0, 0
    for one in descendants(pid):
        ran_s += sum(seconds for seconds, _ in scheduled(one).values())
        with contextlib.suppress(OSError):
            faults += int(Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[7])
    return Used(0.0, ran_s, faults)


def rounds(count: int, model: str) -> tuple[dict[str, list[Used]], int]:
    """What each round of each took, in turn, and the tokens of one."""
    found: dict[str, list[Used]] = {kind: [] for kind in KINDS}
    tokens = 0
    with Sandbox(LIMIT_BYTES) as one, Sandbox(LIMIT_BYTES) as other:
        engines = {
            kind: Engine(sandbox, Path(sys.prefix), kind, model=model, processes=2)
            for kind, sandbox in zip(KINDS, (one, other), strict=True)
        }
        for engine in engines.values():
            engine.hear("filled")
            engine.say("calm")
        for number in range(WARM_ROUNDS + count):
            for kind in KINDS if number % 2 else KINDS[::-1]:
                before = used(engines[kind].child.pid)
                engines[kind].say("one")
                told = engines[kind].hear("round")
                after = used(engines[kind].child.pid)
                tokens = told["tokens"]
                if number >= WARM_ROUNDS:
                    worked_s = after.processor_s - before.processor_s
                    found[kind].append(Used(told["seconds"], worked_s, after.faults - before.faults))
    return found, tokens


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="of each")
    parser.add_argument("--model", choices=("model", "wide"), default="model", help="of make test-vllm")
    parser.add_argument("--record", type=Path, help="JSON file")
    options = parser.parse_args()
    load = load_average()
    found, tokens = rounds(options.rounds, options.model)
    seconds = {kind: [one.seconds for one in some] for kind, some in found.items()}
    worked = {kind: quantile([one.processor_s for one in some], 0.5) for kind, some in found.items()}
    pairs = [a / b for a, b in zip(seconds["stock"], seconds["governed"], strict=True)]
    record = Record(
        model=options.model,
        load=load,
        tokens=tokens,
        seconds={kind: [round(one, 5) for one in some] for kind, some in seconds.items()},
        ratio=round(quantile(seconds["stock"], 0.5) / quantile(seconds["governed"], 0.5), 4),
        ratio_low=round(quantile(pairs, 0.05), 4),
        ratio_high=round(quantile(pairs, 0.95), 4),
        processor_s={kind: round(one, 5) for kind, one in worked.items()},
        processor_ratio=round(worked["stock"] / worked["governed"], 4),
        faults={k: round(sum(one.faults for one in some) / len(some), 1) for k, some in found.items()},
    )
    print(f"throughput governed / stock: {record.ratio} (pairs: {record.ratio_low} to {record.ratio_high})")
    print(f"processor time stock / governed: {record.processor_ratio} {record.processor_s}")
    print(f"page faults in a round: {record.faults}")
    keep(record, options.record)


if __name__ == "__main__":
    main()
