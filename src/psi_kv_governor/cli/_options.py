"""Options that more than one command has."""

from __future__ import annotations

import click

from psi_kv_governor.engines.simulated import CELL_BYTES

cell_bytes_option = click.option(
    "--cell-bytes",
    type=click.IntRange(min=1),
    default=CELL_BYTES,
    show_default=True,
    help="Bytes of one of the cells; the default is a cell of the demo model.",
)
