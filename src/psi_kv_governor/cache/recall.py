"""Recall: which parked cells may change places with live ones when a question needs them."""

from __future__ import annotations

from typing import Literal

import msgspec

from psi_kv_governor.cache.ranges import Range

RecallMode = Literal["off", "follow", "ahead"]
"""`follow`: what newer queries look for comes back as decoding goes on. `ahead`: besides, the end of a prompt
is decoded a second time where it asked for what was not there."""


class Recall(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine may do by itself while something is masked. As many cells stay live as before."""

    mode: RecallMode = "off"
    sink_cells: int = 0
    """First positions that stay live."""
    window_cells: int = 0
    """Last positions that do."""
    marked: tuple[Range, ...] = ()
    """Positions of any sequence that do."""
    paused: bool = False
    """Memory is short: nothing comes in."""
    bytes_per_s: float = 0.0
    """Bytes that may be read for it."""


class Recalled(msgspec.Struct, frozen=True, kw_only=True):
    """What recall did since the engine began."""

    read_bytes: int = 0
    blocks: int = 0
    """Blocks that came back."""
    exchanges: int = 0
    decoded_again: int = 0
    """Prompts whose end was decoded a second time."""
    summary_bytes: int = 0
    """In memory for each parked cell."""
    why_not: str = ""
    """Why nothing can be recalled here; empty where it can."""
