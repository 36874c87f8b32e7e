"""What `psi-kv demo` shows: its two runs as one table on standard output."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from psi_kv_governor.sandbox.load import MIB
from psi_kv_governor.sandbox.scene import SceneResult
from psi_kv_governor.sandbox.scene_options import SceneOptions

TITLES: dict[str, str] = {"fixed": "ungoverned", "psi": "governed"}
_PLAIN_WIDTH = 100


def introduction(options: SceneOptions) -> str:
    """What is about to happen, in a line."""
    if options.gentle:
        return f"{options.context_tokens:,} tokens of context; half of what may go is trimmed on order"
    swap = "zram swap" if options.swap_bytes else "no swap"
    return (
        f"{options.context_tokens:,} tokens of context in {options.limit_bytes // MIB} MiB with {swap}; "
        f"a neighbour takes {options.pressure_bytes // MIB} MiB"
    )


def print_results(options: SceneOptions, results: Sequence[SceneResult]) -> None:
    """The table at the end, and in a line what it says."""
    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else _PLAIN_WIDTH, color_system="auto" if terminal else None)
    console.print(introduction(options), highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("", no_wrap=True)
    for result in results:
        table.add_column(TITLES[result.variant], justify="right")
    columns = [figures(result) for result in results]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    console.print(table)
    console.print(verdict(*results), highlight=False, soft_wrap=True)


def figures(result: SceneResult) -> dict[str, str]:
    """The lines of a variant's column by their names."""
    return {
        "tokens per second": f"{result.tokens_per_s:.1f}",
        "  before the neighbour came": f"{result.calm_tokens_per_s:.1f}",
        "p50 of a token": _ms(result.p50_s),
        "p99 of a token": _ms(result.p99_s),
        "time lost to stalls": "not known" if result.stall is None else f"{result.stall:.0%}",
        "peak resident memory": f"{result.peak_resident_bytes / MIB:.0f} MiB",
        "final resident memory": "-" if result.killed else f"{result.final_resident_bytes / MIB:.0f} MiB",
        "most in swap": f"{result.most_swapped_bytes / MIB:.0f} MiB",
        "bytes returned": f"{result.bytes_returned / MIB:.1f} MiB",
        "first trim after": "-" if result.first_trim_s is None else f"{result.first_trim_s:.2f} s",
        "restored": _restored(result),
        "killed": _killed(result),
    }


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.0f} ms"


def _restored(result: SceneResult) -> str:
    if result.restored is None:
        return "nothing was given up"
    if result.killed:
        return "no: killed"
    how = " (asked to)" if result.restored_on_request else ""
    return f"yes, every cell{how}" if result.restored else f"no: {result.missing_cells} cells are missing"


def _killed(result: SceneResult) -> str:
    if result.killed:
        return f"yes, after {result.tokens} tokens"
    return "no, but the neighbour was" if result.neighbour_killed else "no"


def verdict(fixed: SceneResult, psi: SceneResult) -> str:
    """The two runs in one line."""
    if psi.killed:
        return "The governed run was killed: give a higher --limit-mib or a smaller --pressure-mib."
    back = "and its context is whole again" if psi.restored else f"and {psi.missing_cells} cells are missing"
    if psi.restored is None:
        return "There was no pressure to speak of, nothing was given up: try a larger --pressure-mib."
    returned = f"The governed run returned {psi.bytes_returned / MIB:.0f} MiB, {back}"
    if fixed.killed:
        return f"{returned}; the ungoverned one was killed."
    if psi.first_trim_s is None:
        return f"{returned}."
    times = psi.tokens_per_s / fixed.tokens_per_s
    return f"{returned}; it decoded {times:.1f} times as fast as the ungoverned one."
