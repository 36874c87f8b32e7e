"""What `psi-kv watch` shows of a governed process: how it stands, the last minute, and what happened."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from rich.console import Group
from rich.table import Table
from rich.text import Text

from psi_kv_governor.cli._scene_view import words_of
from psi_kv_governor.events import Event
from psi_kv_governor.status import Status
from psi_kv_governor.status_socket import Update

MIB = 1 << 20
HISTORY = 60
"""Columns of a curve: a minute, a column a second."""
EVENT_LINES = 12
BAR_COLUMNS = 40
_BLOCKS = " ▁▂▃▄▅▆▇█"
_MODE_STYLES = {
    "calm": "green",
    "watching": "yellow",
    "trimming": "bold red",
    "holding": "magenta",
    "restoring": "cyan",
}
_SHOWN = {"mode", "source", "some", "full", "headroom_bytes", "live_cells", "spilled_cells", "lost_cells",
          "cell_bytes", "store_bytes"}  # fmt: skip


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
        title = Text.assemble(
            (self._name, "bold"), "  ", (status.mode.value, _MODE_STYLES.get(status.mode.value, ""))
        )
        return Group(title, table, Text(), *self._events(self._update.time_s))

    def _rows(self, status: Status) -> Iterator[tuple[str, Text]]:
        high = self._config.get("high", 1.0)
        style = "red" if status.some >= high else ""
        yield "stall", Text(f"{status.some:6.1%} some, {status.full:.1%} full; trims from {high:.0%}", style)
        yield "", Text(sparkline(self._stall), style="red")
        if status.headroom_bytes is not None:
            yield "headroom", Text(f"{status.headroom_bytes / MIB:,.0f} MiB")
        yield "cells", cells_bar(status)
        megabytes = status.live_bytes / MIB
        yield (
            "",
            Text(
                f"{status.live_cells:,} live ({megabytes:,.1f} MiB), {status.spilled_cells:,} spilled, "
                f"{status.lost_cells:,} lost; store {status.store_bytes / MIB:,.1f} MiB"
            ),
        )
        yield "source", Text(status.source)
        for name, value in more(status).items():
            yield name.replace("_", " "), Text(str(value))

    def _events(self, now_s: float) -> Iterator[Text]:
        for time_s, words in self._lines:
            ago = f"{max(0.0, now_s - time_s):5.0f} s ago  "
            yield Text(ago + words, no_wrap=True, overflow="ellipsis", style="dim")


def more(status: Status) -> dict[str, Any]:
    """What a Status says beyond the fields that have a place of their own."""
    values: dict[str, Any] = msgspec.to_builtins(status)
    return {name: value for name, value in values.items() if name not in _SHOWN}


def sparkline(shares: deque[float]) -> str:
    """Shares from 0 to 1 as a row of blocks; anything above 0 shows."""
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[min(top, max(int(share > 0.0), round(share * top)))] for share in shares)


def cells_bar(status: Status) -> Text:
    """Live, spilled and lost cells as parts of one bar."""
    total = max(1, status.live_cells + status.holes)
    bar = Text()
    for cells, sign, style in (
        (status.live_cells, "█", "cyan"),
        (status.spilled_cells, "▒", "yellow"),
        (status.lost_cells, "·", "red"),
    ):
        columns = max(int(cells > 0), round(BAR_COLUMNS * cells / total))
        bar.append(sign * columns, style)
    return bar


def plain_line(update: Update) -> str:
    """An update in a line, for an output that is no terminal."""
    status = update.status
    room = "" if status.headroom_bytes is None else f", headroom {status.headroom_bytes / MIB:,.0f} MiB"
    return (
        f"{status.mode.value}: stall {status.some:.1%}{room}, {status.live_cells:,} cells live, "
        f"{status.spilled_cells:,} spilled, {status.lost_cells:,} lost"
    )


def event_line(event: Event, now_s: float) -> str:
    """An event with the time of day at which it was, as near as the update tells."""
    when = time.localtime(time.time() - max(0.0, now_s - event.time_s))
    return f"{time.strftime('%H:%M:%S', when)} {words_of(event)}"
