"""What a status socket sends by itself: a JSON line each. Answers to commands are in `commands`."""

from __future__ import annotations

from typing import Any

import msgspec

from psi_kv_governor.events import Event
from psi_kv_governor.status import Status

VERSION = 2
"""Of the protocol; it stands in Hello."""


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """The first line: who speaks."""

    psi_kv_status: int
    """Version of the protocol."""
    pid: int
    name: str = ""
    """What is governed: the program's name, where one is known."""
    config: dict[str, Any]


class Update(msgspec.Struct, frozen=True, kw_only=True, tag_field="says", tag="update"):
    """How things stand, and the events since the last update."""

    time_s: float
    """Monotonic time of the governed process."""
    status: Status
    events: list[Event]
    """In the first update: the last ones before it."""
