"""What `psi-kv demo` shows: the running scene on standard error, the figures on standard output."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from psi_kv_governor.bench.messages import Variant
from psi_kv_governor.bench.script import (
    MIB,
    Happened,
    SceneEvent,
    SceneOptions,
    SceneResult,
    StageChanged,
    Tick,
)
from psi_kv_governor.events import (
    Degraded,
    Event,
    ModeChanged,
    Recomputed,
    Released,
    Restored,
    SourceChanged,
    Trimmed,
)

TITLES: dict[Variant, str] = {"fixed": "ungoverned", "psi": "governed"}
_STAGES = {
    "load": "loading the model",
    "prefill": "filling the context",
    "calm": "decoding in peace",
    "pressed": "decoding",
    "restore": "waiting for quiet",
}
_PLAIN_WIDTH = 100
_EVENT_LINES = 10
_PLAIN_TICK_S = 5.0


class _Row:
    """What is known of one variant."""

    def __init__(self) -> None:
        self.stage: StageChanged | None = None
        self.tick: Tick | None = None

    def cells(self) -> Iterator[str]:
        """The columns after the name."""
        stage, tick = self.stage, self.tick
        if stage is None:
            yield "waits for its turn"
        else:
            share = f" {stage.done / stage.total:.0%}" if stage.stage == "prefill" else ""
            yield _STAGES[stage.stage] + share
        if tick is None:
            yield from ("", "", "", "", "")
            return
        yield "" if tick.stall is None else f"{tick.stall:.0%}"
        yield f"{tick.resident_bytes / MIB:.0f} MiB"
        yield f"{tick.live_cells:,}"
        yield f"{tick.tokens}"
        yield f"{tick.tokens_per_s:.1f}" if tick.tokens else ""


class DemoView:
    """Takes in the events of scenes. Live where standard error is a terminal, else a line now and then."""

    def __init__(self, options: SceneOptions) -> None:
        self._options = options
        self._rows: dict[Variant, _Row] = {variant: _Row() for variant in TITLES}
        self._lines: deque[str] = deque(maxlen=_EVENT_LINES)
        self._console = Console(stderr=True)
        self._said_s = 0.0
        terminal = self._console.is_terminal
        self._live = (
            Live(console=self._console, get_renderable=self._render, refresh_per_second=2)
            if terminal
            else None
        )

    def __call__(self, event: SceneEvent) -> None:
        """Show an event of a running scene."""
        row = self._rows[event.variant]
        if isinstance(event, StageChanged):
            new = row.stage is None or row.stage.stage != event.stage
            row.stage = event
            if new:
                self._say(event.variant, _STAGES[event.stage])
        elif isinstance(event, Tick):
            row.tick = event
            if self._live is None and time.monotonic() - self._said_s >= _PLAIN_TICK_S:
                self._say(event.variant, ", ".join(_words_of_tick(event)))
        elif isinstance(event, Happened):
            self._say(event.variant, words_of(event.event))

    def __enter__(self) -> DemoView:
        self._say(None, introduction(self._options))
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def _say(self, variant: Variant | None, words: str) -> None:
        line = words if variant is None else f"{TITLES[variant]}: {words}"
        self._said_s = time.monotonic()
        if self._live is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._lines.append(line)

    def _render(self) -> Group:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for title in ("", "", "stall", "resident", "cells", "tokens", "tokens/s"):
            table.add_column(title, justify="right" if title else "left", no_wrap=True)
        for variant, row in self._rows.items():
            table.add_row(Text(TITLES[variant], style="bold"), *row.cells())
        return Group(
            table,
            Text(),
            *(Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in self._lines),
        )


def introduction(options: SceneOptions) -> str:
    """What is about to happen, in a line."""
    if options.gentle:
        return f"{options.context_tokens:,} tokens of context; half of what may go is trimmed by hand"
    swap = "zram swap" if options.swap == "zram" else "no swap"
    return (
        f"{options.context_tokens:,} tokens of context in {options.limit_bytes // MIB} MiB with {swap}; "
        f"a neighbour takes {options.pressure_bytes // MIB} MiB"
    )


def words_of(event: Event) -> str:
    """An event of the governor in a line."""
    match event:
        case Trimmed():
            words = f"gave up {event.cells} cells, {event.bytes_returned / MIB:.1f} MiB returned"
        case Restored():
            words = f"put {event.cells} cells back in {event.seconds * 1e3:.0f} ms, {event.missing} missing"
        case Recomputed():
            words = f"computed {event.cells} cells again in {event.seconds:.1f} s"
        case Released():
            words = f"released {event.bytes_returned / MIB:.1f} MiB of free cells"
        case Degraded():
            words = f"does without {event.what}: {event.why}"
        case ModeChanged():
            words = f"{event.new.value}: {event.reason}"
        case SourceChanged():
            words = f"reads {event.source} ({event.why})"
    return words


def _words_of_tick(tick: Tick) -> Iterator[str]:
    if tick.stall is not None:
        yield f"stall {tick.stall:.0%}"
    yield f"{tick.resident_bytes / MIB:.0f} MiB resident"
    yield f"{tick.live_cells:,} cells"
    if tick.tokens:
        yield f"{tick.tokens} tokens at {tick.tokens_per_s:.1f} a second"


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
    how = " (asked to)" if result.restored_by_hand else ""
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
