"""What a series of looks and tokens says of one onset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from psi_kv_governor.events import Restored, Trimmed
from psikv_bench.messages import Token
from psikv_bench.watch import Look

AFTER_S = 0.2
"""After a trim or a restore caches are cold, and pages are faulted in: tokens until then are near it."""


class Signal(NamedTuple):
    """The first sign of need."""

    time_s: float
    what: str
    """`stall` or `headroom`."""


def first_signal(looks: Iterable[Look], since_s: float, stall_us: int, line_bytes: float) -> Signal | None:
    """When `some` had grown by `stall_us` since `since_s`, or the headroom was under the line: the first.

    The stall is counted from the last look before `since_s`. None where neither happened.
    """
    before: int | None = None
    for look in looks:
        some_us = 0 if look.inside is None else look.inside.some_us
        if look.time_s < since_s or before is None:
            before = some_us
            if look.time_s < since_s:
                continue
        if look.headroom_bytes < line_bytes:
            return Signal(look.time_s, "headroom")
        if some_us - before >= stall_us:
            return Signal(look.time_s, "stall")
    return None


def poll_time(looks: Sequence[Look], since_s: float, threshold: float, poll_s: float) -> float | None:
    """When somebody who reads avg10 every `poll_s` would first have seen it at `threshold` (0 to 1) or above.

    The polls stand on whole multiples of `poll_s` of the clock, at no known distance from the onset, as a
    poller's would. None where no poll before the end of the series saw it.
    """
    due_s = (since_s // poll_s + 1) * poll_s
    previous: Look | None = None
    for look in looks:
        while look.time_s > due_s:
            if previous is not None and previous.inside is not None and previous.inside.avg10 >= threshold:
                return due_s
            due_s += poll_s
        previous = look
    return None


class Near(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of each token, by what was going on while it was decoded."""

    calm: list[float]
    """Before the neighbour came."""
    trim: list[float]
    restore: list[float]
    pressed: list[float]
    """Beside the neighbour, and near neither."""


Span = tuple[float, float]


def span(event: Trimmed | Restored) -> Span:
    """From when to when it was done."""
    return event.time_s - event.seconds, event.time_s


def near(tokens: Sequence[Token], trims: Sequence[Span], restores: Sequence[Span], pressed: Span) -> Near:
    """Sort tokens by what they overlap with; `trims` and `restores` are (begin, end) of each.

    A token that overlaps both counts for the restore; what comes after the pressure and near nothing is
    left out, since the governor still settles then.
    """
    found = Near(calm=[], trim=[], restore=[], pressed=[])
    for token in tokens:
        if token.tokens != 1:
            continue
        begin, end = token.time_s - token.seconds, token.time_s
        if _overlaps(begin, end, restores):
            found.restore.append(token.seconds)
        elif _overlaps(begin, end, trims):
            found.trim.append(token.seconds)
        elif end < pressed[0]:
            found.calm.append(token.seconds)
        elif begin < pressed[1]:
            found.pressed.append(token.seconds)
    return found


def _overlaps(begin: float, end: float, spans: Sequence[Span]) -> bool:
    return any(start < end and begin < stop + AFTER_S for start, stop in spans)
