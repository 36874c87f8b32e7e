"""What `psi-kv watch` shows of a governed process: how it stands, the last minute, and what happened."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from psi_kv_governor.amounts import mib
from psi_kv_governor.cache import CacheState, SequenceState
from psi_kv_governor.cli._event_words import words_of
from psi_kv_governor.events import Event
from psi_kv_governor.status import Status
from psi_kv_governor.status_messages import Update

MIB = 1 << 20
HISTORY = 60
"""Columns of a curve: a minute, a column a second."""
EVENT_LINES = 12
BAR_COLUMNS = 16
MOST_SEQUENCES = 16
"""Of one cache; how many more there are is said."""
_BLOCKS = " ▁▂▃▄▅▆▇█"
_MODE_STYLES = {
    "calm": "green",
    "watching": "yellow",
    "trimming": "bold red",
    "holding": "magenta",
    "restoring": "cyan",
}


class WatchView:
    """Takes in updates; is drawn by rich."""

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self._name = name
        self._config = config
        self._update: Update | None = None
        self._stall: deque[float] = deque(maxlen=HISTORY)
        self._lines: deque[tuple[float, str]] = deque(maxlen=EVENT_LINES)
        self._second = -1

    def take(self, update: Update) -> None:
        """Show this from now on."""
        self._update = update
        if int(update.time_s) == self._second and self._stall:
            self._stall[-1] = max(self._stall[-1], update.status.some)
        else:
            self._second = int(update.time_s)
            self._stall.append(update.status.some)
        for event in update.events:
            self._lines.append((event.time_s, words_of(event)))

    def __rich__(self) -> Group:
        if self._update is None:
            return Group(Text(f"{self._name}: waiting for its first word", style="dim"))
        status = self._update.status
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(no_wrap=True)
        for name, value in self._rows(status):
            table.add_row(name, value)
        mode = status.mode.value
        title = Text.assemble((self._name, "bold"), "  ", (mode, _MODE_STYLES.get(mode, "")))
        caches = cache_lines(status, self._update.time_s)
        return Group(title, table, Text(), *caches, Text(), *self._events(self._update.time_s))

    def _rows(self, status: Status) -> Iterator[tuple[str, Text]]:
        high = self._config.get("high", 1.0)
        style = "red" if status.some >= high else ""
        yield "stall", Text(f"{status.some:6.1%} some, {status.full:.1%} full; trims from {high:.0%}", style)
        yield "", Text(sparkline(self._stall), style="red")
        if status.headroom_bytes is not None:
            yield "headroom", Text(f"{status.headroom_bytes / MIB:,.0f} MiB")
        yield "cells", Text(_cells(status.live_cells, status.masked_cells, status.lost_cells))
        yield (
            "memory",
            Text(
                f"{mib(status.resident_bytes)} resident, {mib(status.parked_bytes)} parked, "
                f"{mib(status.dirty_bytes)} dirty; {mib(status.written_bytes)} written so far"
            ),
        )
        if status.affected_tokens:
            yield "affected", Text(f"{status.affected_tokens:,} tokens were decoded while others were away")
        if status.limit is not None or status.limit_bytes is not None:
            yield "limit", Text(limit_words(status))
        yield "lives in", Text(f"{status.backing} {status.place}".strip())
        yield "source", Text(status.source)
        yield "why", Text(status.reason)

    def _events(self, now_s: float) -> Iterator[Text]:
        for time_s, words in self._lines:
            ago = f"{max(0.0, now_s - time_s):5.0f} s ago  "
            yield Text(ago + words, no_wrap=True, overflow="ellipsis", style="dim")


def limit_words(status: Status) -> str:
    """What may be held under pressure."""
    if status.limit_bytes is not None:
        return f"{mib(status.limit_bytes)} under pressure"
    return "none" if status.limit is None else f"{status.limit:.0%} of the cells under pressure"


def cache_lines(status: Status, now_s: float) -> Iterator[Text]:
    """Every cache, and below it its sequences and saved states."""
    for cache in status.caches:
        yield Text.assemble(
            (f"{cache.name} ", "bold"),
            f"cache {cache.id} of process {cache.pid}: {cache.capacity_cells:,} cells, "
            f"{mib(cache.resident_bytes)} resident",
            "" if cache.maskable else f"; can't be masked: {cache.why_not_maskable}",
        )
        for sequence in cache.sequences[:MOST_SEQUENCES]:
            yield _sequence_line(cache, sequence, now_s)
        if (more := len(cache.sequences) - MOST_SEQUENCES) > 0:
            yield Text(f"  and {more} more sequences", style="dim")
        if cache.blobs:
            parked = [blob.n_bytes for blob in cache.blobs if blob.parked]
            total = sum(blob.n_bytes for blob in cache.blobs)
            yield Text(f"  {len(cache.blobs)} saved states, {mib(total)}; {mib(sum(parked))} of it parked")


def _sequence_line(cache: CacheState, sequence: SequenceState, now_s: float) -> Text:
    parked = sequence.parked_cells(cache.cell_bytes)
    state = "running" if sequence.running else f"idle {max(0.0, now_s - sequence.last_used_s):.0f} s"
    words = _cells(sequence.live_cells, sequence.masked_cells, sequence.lost_cells, parked)
    line = Text(f"  {sequence.id:>4} {state:<10} ", no_wrap=True, overflow="ellipsis")
    line.append(cells_bar(sequence, parked))
    line.append(f" {words}")
    return line


def _cells(live: int, masked: int, lost: int, parked: int = 0) -> str:
    away = f" ({parked:,} parked)" if parked else ""
    return f"{live:,} live{away}, {masked:,} masked, {lost:,} lost"


def sparkline(shares: deque[float]) -> str:
    """Shares from 0 to 1 as a row of blocks; anything above 0 shows."""
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[min(top, max(int(share > 0.0), round(share * top)))] for share in shares)


def cells_bar(sequence: SequenceState, parked_cells: int) -> Text:
    """Live, parked, masked and lost cells as parts of one bar."""
    total = max(1, sequence.live_cells + sequence.masked_cells + sequence.lost_cells)
    bar = Text()
    for cells, sign, style in (
        (sequence.live_cells - parked_cells, "█", "cyan"),
        (parked_cells, "▓", "blue"),
        (sequence.masked_cells, "▒", "yellow"),
        (sequence.lost_cells, "·", "red"),
    ):
        columns = max(int(cells > 0), round(BAR_COLUMNS * cells / total))
        bar.append(sign * columns, style)
    return bar


def plain_line(update: Update) -> str:
    """An update in a line, for an output that is no terminal."""
    status = update.status
    headroom = "" if status.headroom_bytes is None else f", headroom {status.headroom_bytes / MIB:,.0f} MiB"
    cells = _cells(status.live_cells, status.masked_cells, status.lost_cells)
    return f"{status.mode.value}: stall {status.some:.1%}{headroom}, {cells}"


def event_line(event: Event, now_s: float) -> str:
    """An event with the time of day at which it was, as near as the update tells."""
    when = time.localtime(time.time() - max(0.0, now_s - event.time_s))
    return f"{time.strftime('%H:%M:%S', when)} {words_of(event)}"
