"""Running scenes on standard error: live on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from psi_kv_governor.cli._event_words import words_of
from psi_kv_governor.sandbox.load import MIB
from psi_kv_governor.sandbox.scene_options import STAGES, Said, Tick

_EVENT_LINES = 10
_PLAIN_TICK_S = 5.0


class _Row:
    """What is known of one variant."""

    def __init__(self) -> None:
        self.stage: Said | None = None
        self.tick: Tick | None = None

    def cells(self) -> Iterator[str]:
        """The columns after the name."""
        stage, tick = self.stage, self.tick
        if stage is None:
            yield "waits for its turn"
        else:
            share = f" {stage.done / stage.total:.0%}" if stage.stage == "prefill" else ""
            yield STAGES[stage.stage] + share
        if tick is None:
            yield from ("", "", "", "", "")
            return
        yield "" if tick.stall is None else f"{tick.stall:.0%}"
        yield f"{tick.resident_bytes / MIB:.0f} MiB"
        yield f"{tick.live_cells:,}"
        yield f"{tick.tokens}"
        yield f"{tick.tokens_per_s:.1f}" if tick.tokens else ""


class SceneView:
    """Takes in the events of scenes; `titles` are the variants and what they are called."""

    def __init__(self, titles: Mapping[str, str], introduction: str) -> None:
        self._titles, self._introduction = titles, introduction
        self._rows = {variant: _Row() for variant in titles}
        self._lines: deque[str] = deque(maxlen=_EVENT_LINES)
        self._console = Console(stderr=True)
        self._said_s = 0.0
        terminal = self._console.is_terminal
        self._live = (
            Live(console=self._console, get_renderable=self._render, refresh_per_second=2)
            if terminal
            else None
        )

    def show(self, variant: str, event: Said | Tick) -> None:
        """An event of the scene that `variant` plays."""
        row = self._rows[variant]
        if isinstance(event, Tick):
            row.tick = event
            if self._live is None and time.monotonic() - self._said_s >= _PLAIN_TICK_S:
                self._show(variant, ", ".join(_words_of_tick(event)))
        elif event.event is not None:
            self._show(variant, words_of(event.event))
        else:
            new = row.stage is None or row.stage.stage != event.stage
            row.stage = event
            if new:
                self._show(variant, STAGES[event.stage])

    def __enter__(self) -> SceneView:
        self.say(self._introduction)
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """Show a line."""
        self._said_s = time.monotonic()
        if self._live is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._lines.append(line)

    def _show(self, variant: str, words: str) -> None:
        self.say(f"{self._titles[variant]}: {words}")

    def _render(self) -> Group:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for title in ("", "", "stall", "resident", "cells", "tokens", "tokens/s"):
            table.add_column(title, justify="right" if title else "left", no_wrap=True)
        for variant, row in self._rows.items():
            table.add_row(Text(self._titles[variant], style="bold"), *row.cells())
        return Group(
            table,
            Text(),
            *(Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in self._lines),
        )


def _words_of_tick(tick: Tick) -> Iterator[str]:
    if tick.stall is not None:
        yield f"stall {tick.stall:.0%}"
    yield f"{tick.resident_bytes / MIB:.0f} MiB resident"
    yield f"{tick.live_cells:,} cells"
    if tick.tokens:
        yield f"{tick.tokens} tokens at {tick.tokens_per_s:.1f} a second"
