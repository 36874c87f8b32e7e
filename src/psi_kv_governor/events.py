"""What happened, as dataclasses. Every subscriber and every sink gets the same ones."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from psi_kv_governor.control.decision import Mode
from psi_kv_governor.errors import BadInputError


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag=True, tag_field="event"):
    time_s: float
    """Monotonic time, the same clock as in Reading."""


class ModeChanged(_Event, frozen=True, kw_only=True):
    """The governor went from one mode to another."""

    old: Mode
    new: Mode
    reason: str


class Trimmed(_Event, frozen=True, kw_only=True):
    """Memory was given up: parked, parked and masked, or without a place to park evicted."""

    cells: int
    masked: int
    """Of these, the ones that attention passes over from now on."""
    lost: int = 0
    """Of these, the ones whose content is gone: only decoding them again brings them back."""
    bytes_returned: int
    written_bytes: int = 0
    seconds: float
    reason: str


class Restored(_Event, frozen=True, kw_only=True):
    """Masked cells are back, bit for bit."""

    cells: int
    bytes_back: int
    seconds: float
    masked_bytes: int
    """What is still masked."""


class Recomputed(_Event, frozen=True, kw_only=True):
    """Tokens were decoded again."""

    cells: int
    seconds: float


class Released(_Event, frozen=True, kw_only=True):
    """Pages of cells nobody used went back."""

    bytes_returned: int


class Degraded(_Event, frozen=True, kw_only=True):
    """A step can't be done here (any more). Said once for each cause."""

    what: str
    why: str


class SourceChanged(_Event, frozen=True, kw_only=True):
    """The governor reads the machine's pressure from another place now."""

    source: str
    why: str


class CacheOpened(_Event, frozen=True, kw_only=True):
    """A cache is governed from now on."""

    cache: int
    name: str
    pid: int


class CacheClosed(_Event, frozen=True, kw_only=True):
    """A cache is gone: its model was closed, or its process ended."""

    cache: int
    name: str


class AnsweredMasked(_Event, frozen=True, kw_only=True):
    """An answer has ended, and some of its tokens were decoded while cells of its sequence were masked."""

    cache: int
    pid: int
    sequence: int
    """The slot, in a server."""
    tokens: int
    """Of the answer and its prompt: so many were decoded without the whole context."""
    masked: int
    """Most cells that were masked (or lost) meanwhile."""


Event = (
    AnsweredMasked
    | CacheOpened
    | CacheClosed
    | ModeChanged
    | Trimmed
    | Restored
    | Recomputed
    | Released
    | Degraded
    | SourceChanged
)


class JsonLinesSink:
    """Appends each event to a file, a line each, as it happens. Use it as a subscriber."""

    def __init__(self, path: Path) -> None:
        """Raises BadInputError where `path` can't be written to."""
        try:
            # 0600: which ranges of a conversation went when is nobody else's matter.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise BadInputError(f"cannot write events to {path}: {error.strerror}") from error
        self._file = os.fdopen(descriptor, "ab", buffering=0)

    def __call__(self, event: Event) -> None:
        """Write `event`. Raises OSError."""
        self._file.write(msgspec.json.encode(event) + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()
