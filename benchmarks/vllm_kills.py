"""Who lives when a neighbour takes four times what is left: vLLM as it is, and governed. See vllm_scene.py.

    .venv-vllm/bin/python benchmarks/vllm_kills.py --repeats 20 --record data/bench-vllm/kills.json
    .venv-vllm/bin/python benchmarks/vllm_kills.py --demo

A record is gone on with: what is in it is not played again. The demo plays each once, and keeps nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.quantile import quantile
from psi_kv_governor.sandbox.sandbox import Sandbox
from vllm_scene import KINDS, NEIGHBOUR_MIB, SPARE_MIB, Told, Where, keep, load_average, play


class Record(Where, kw_only=True):
    """All plays so far."""

    plays: list[Told] = msgspec.field(default_factory=list)
    loads: list[float] = msgspec.field(default_factory=list)
    """Before each."""


def table(plays: list[Told]) -> Table:
    """A column for each rate and kind."""
    shown, columns = Table(""), []
    for rate in dict.fromkeys(one.rate_mib_s for one in plays):
        for kind in KINDS:
            if some := [one for one in plays if (one.kind, one.rate_mib_s) == (kind, rate)]:
                shown.add_column(f"{kind}, {f'{rate} MB/s' if rate else 'all at once'}")
                columns.append(_column(some))
    for name in columns[0] if columns else ():
        shown.add_row(name, *(column[name] for column in columns))
    return shown


def _column(some: list[Told]) -> dict[str, str]:
    trim_ms = [1e3 * seconds for one in some for seconds in one.trim_s]
    return {
        "plays": str(len(some)),
        "OOM kills": str(sum(one.kills for one in some)),
        "plays that the engine lived through": str(sum(one.same is not None for one in some)),
        "same texts afterwards": str(sum(one.same is True for one in some)),
        "tokens/s before, median": _quantile([one.calm_tokens_per_s for one in some], 0.5, 1),
        "tokens/s while pressed, median": _quantile([one.pressed_tokens_per_s for one in some], 0.5, 1),
        "ms from a trim to its bytes, p50": _quantile(trim_ms, 0.5),
        "the same, p99": _quantile(trim_ms, 0.99),
    }


def _quantile(values: Sequence[float | None], share: float, digits: int = 0) -> str:
    known = [value for value in values if value]
    return f"{quantile(known, share):.{digits}f}" if known else "-"


def main() -> None:
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
        raise PsiKvError(why)
    if options.demo:
        options.repeats, options.rates, options.record = 1, [200], None
        print(
            f"A vLLM engine whose cache is full works in a memory cgroup without swap, {SPARE_MIB} MB below "
            f"its limit.\nA neighbour takes {NEIGHBOUR_MIB} MB. Two plays, a minute or two each."
        )
    there = options.record is not None and options.record.exists()
    record = msgspec.json.decode(options.record.read_bytes(), type=Record) if there else Record()
    played = [(one.kind, one.rate_mib_s) for one in record.plays]
    wanted = [(kind, rate) for rate in options.rates for kind in options.kinds]
    for number in range(options.repeats):
        for kind, rate in wanted:
            if played.count((kind, rate)) > number:
                continue
            said = f"{kind}, {f'{rate} MB/s' if rate else 'as fast as it can'} ..."
            print(said, file=sys.stderr, flush=True)
            record.loads.append(load_average())
            record.plays.append(play(Path(sys.prefix), kind, rate))
            keep(record, options.record)
    Console().print(table(record.plays))


if __name__ == "__main__":
    try:
        main()
    except PsiKvError as error:
        sys.exit(f"vllm_kills: {error}")
