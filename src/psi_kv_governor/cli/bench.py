"""`psi-kv bench`: the benchmarks, which are a project of their own (`benchmarks/`)."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import click

from psi_kv_governor.errors import PsiKvError

MISSING = (
    "the benchmarks are not installed: take the sources of this version and run `make setup`, or "
    "`pip install ./benchmarks`"
)


@click.command(
    "bench",
    short_help="Measure the governor on this machine.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def missing(arguments: tuple[str, ...]) -> None:
    """Says how to get them."""
    raise PsiKvError(MISSING)


def find() -> click.Command:
    """The command of the benchmarks, or one that says how to get them."""
    if find_spec("psikv_bench") is None:
        return missing
    found: click.Command = import_module("psikv_bench.cli").command
    return found


command = find()
