"""`psi-kv bench latency`: from the first sign of need to the bytes returned."""

from __future__ import annotations

from typing import Any, get_args

import click

from psi_kv_governor.bench.pen import Swap
from psi_kv_governor.cli._group import example
from psi_kv_governor.cli._trials import chosen, mib, play, trial_options
from psi_kv_governor.errors import BadInputError


@click.command(
    "latency",
    epilog=example(
        "psi-kv bench latency --quick",
        "psi-kv bench latency --onsets 100 --out-dir latency",
        "psi-kv bench latency --modes decode --rate 200",
    ),
)
@click.option("--onsets", type=int, help="Of each mode [100].")
@click.option("--control", type=int, help="Onsets of each mode beside an ungoverned model, besides [10].")
@click.option("--modes", metavar="NAMES", help="Of decode, prefill, idle [all].")
@click.option("--rate", type=float, help="MB/s at which the neighbour takes memory [100].")
@click.option("-c", "--ctx", type=int, help="Tokens in the context [4096].")
@click.option("--limit-mib", type=int, help="Of the pen [worked out from what the model takes].")
@click.option("--load-mib", type=int, help="What the neighbour takes [half of what may go must go].")
@click.option("--hold-s", type=float, help="How long the load is held at least [2].")
@click.option("--hold-max-s", type=float, help="And at most, until bytes are back [20].")
@click.option("--avg10", type=float, help="Threshold of the poller it is compared with, 0 to 1 [0.1].")
@click.option("--prompt", type=int, help="Tokens of the prompt that is decoded over and over [1024].")
@click.option("--swap", type=click.Choice(get_args(Swap)), help="Inside of the pen [none].")
@trial_options
def command(
    *,
    onsets: int | None,
    control: int | None,
    modes: str | None,
    rate: float | None,
    ctx: int | None,
    limit_mib: int | None,
    load_mib: int | None,
    hold_s: float | None,
    hold_max_s: float | None,
    avg10: float | None,
    prompt: int | None,
    swap: Swap | None,
    threads: int | None,
    quick: bool,
    **given: Any,
) -> None:
    """Onset after onset of a neighbour beside one model: how fast bytes are back, and what it costs tokens.

    Next to what polling avg10 would have taken on the same onsets.
    """
    from psi_kv_governor.bench.trials import latency_bench
    from psi_kv_governor.bench.trials.latency_plan import LatencyOptions

    asked = chosen(
        latency_bench.QUICK if quick else LatencyOptions(),
        onsets=onsets,
        control=control,
        modes=_modes(modes),
        rate=rate,
        context_tokens=ctx,
        limit_bytes=mib(limit_mib),
        load_bytes=mib(load_mib),
        hold_s=hold_s,
        hold_max_s=hold_max_s,
        avg10=avg10,
        prompt_tokens=prompt,
        swap=swap,
        threads=threads,
    )
    play(latency_bench.run, asked, quick=quick, **given)


def _modes(text: str | None) -> tuple[str, ...] | None:
    from psi_kv_governor.bench.trials.latency_plan import MODES

    if text is None:
        return None
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in MODES:
            raise BadInputError(f"there is no mode {name!r}: known are {', '.join(MODES)}")
    return names
