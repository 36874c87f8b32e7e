"""`psi-kv bench oom`: at which ramp of a neighbour the kernel begins to kill, without swap."""

from __future__ import annotations

from typing import Any

import click

from psi_kv_governor.cli._group import example
from psi_kv_governor.cli._trials import chosen, mib, numbers, play, trial_options


@click.command(
    "oom",
    epilog=example(
        "psi-kv bench oom --quick",
        "psi-kv bench oom --runs 1000 --out-dir oom",
        "psi-kv bench oom --runs 1000 --out-dir oom --resume",
    ),
)
@click.option("--runs", type=int, help="In all, over both variants and all rates [20].")
@click.option("--rates", metavar="MB/S,...", help="Ramps; 0: as fast as it can [10,...,800,0].")
@click.option("-c", "--ctx", type=int, help="Tokens in the context [8192].")
@click.option("--limit-mib", type=int, help="Of the pen [worked out from what the model takes].")
@click.option("--load-mib", type=int, help="What the neighbour takes [so that only a trimmed cache fits].")
@click.option("--hold-s", type=float, help="How long the load is held [2].")
@click.option("--mmap/--no-mmap", default=None, help="Weights as a mapped file, or in memory [mapped].")
@click.option("--seed", type=int, help="Of the order of the rates [1].")
@trial_options
def command(
    *,
    runs: int | None,
    rates: str | None,
    ctx: int | None,
    limit_mib: int | None,
    load_mib: int | None,
    hold_s: float | None,
    mmap: bool | None,
    seed: int | None,
    threads: int | None,
    quick: bool,
    **given: Any,
) -> None:
    """Many short runs in a memory cgroup without swap: kills with a fixed cache and governed.

    A neighbour takes memory at a set rate while the model decodes. Ctrl-C keeps the finished runs.
    """
    from psi_kv_governor.bench.trials import oom_bench
    from psi_kv_governor.bench.trials.oom_plan import OomOptions

    asked = chosen(
        oom_bench.QUICK if quick else OomOptions(),
        runs=runs,
        rates=numbers(rates, "--rates"),
        context_tokens=ctx,
        limit_bytes=mib(limit_mib),
        load_bytes=mib(load_mib),
        hold_s=hold_s,
        mmap=mmap,
        seed=seed,
        threads=threads,
    )
    play(oom_bench.run, asked, quick=quick, **given)
