"""Where tables are printed."""

from __future__ import annotations

import sys

from rich.console import Console

PLAIN_WIDTH = 100
"""Columns where the output is no terminal: the same bytes whatever COLUMNS says."""


def table_console(plain_width: int = PLAIN_WIDTH, *, highlight: bool = True) -> Console:
    """Standard output: as wide and as coloured as a terminal is, else of one width and plain."""
    terminal = sys.stdout.isatty()
    return Console(
        width=None if terminal else plain_width,
        force_terminal=terminal,
        color_system="auto" if terminal else None,
        highlight=highlight,
    )
