"""`psi-kv bench capacity`: the longest context that survives under a memory limit."""

from __future__ import annotations

from typing import Any, get_args

import click

from psi_kv_governor.bench.pen import Swap
from psi_kv_governor.cli._group import example
from psi_kv_governor.cli._trials import MIB, chosen, numbers, play, trial_options


@click.command(
    "capacity",
    epilog=example(
        "psi-kv bench capacity --quick",
        "psi-kv bench capacity --limits 176,200,248 --out-dir capacity",
    ),
)
@click.option("--limits", metavar="MIB,...", help="Of the pens [what the model takes, and 24, 48, 96 more].")
@click.option("--swap", type=click.Choice(get_args(Swap)), help="Inside of the pens [none].")
@click.option("--max-ctx", type=int, help="No longer context is tried [32768].")
@click.option("-n", "--tokens", type=int, help="Decoded at the end of each context [32].")
@click.option("--chunk", type=int, help="Tokens of the prompt decoded at once [128].")
@click.option(
    "--least-tokens-s", type=float, help="What comes slower has not survived [0.1 of its calm speed]."
)
@click.option("--resolution", type=float, help="Factor between the longest and what fails [1.15].")
@trial_options
def command(
    *,
    limits: str | None,
    swap: Swap | None,
    max_ctx: int | None,
    tokens: int | None,
    chunk: int | None,
    least_tokens_s: float | None,
    resolution: float | None,
    threads: int | None,
    quick: bool,
    **given: Any,
) -> None:
    """Doubles and bisects the length of a context, each in a cgroup and a process of its own.

    Fixed and governed. A governed context is not wholly attended to: the table says how much of it is.
    """
    from psi_kv_governor.bench.trials import capacity_bench
    from psi_kv_governor.bench.trials.capacity_plan import CapacityOptions

    found = numbers(limits, "--limits")
    asked = chosen(
        capacity_bench.QUICK if quick else CapacityOptions(),
        limits_bytes=None if found is None else tuple(int(limit * MIB) for limit in found),
        swap=swap,
        most_tokens=max_ctx,
        tokens=tokens,
        chunk=chunk,
        least_tokens_per_s=least_tokens_s,
        resolution=resolution,
        threads=threads,
    )
    play(capacity_bench.run, asked, quick=quick, **given)
