"""How recall's settings are said to an agent, and what it tells of recall."""

from __future__ import annotations

import struct

from psi_kv_governor.cache import Recall, Recalled

_MODES = {"off": 0, "follow": 1, "ahead": 2}
_RECALLED = struct.Struct("<5Q")
_MOST_MARKED = 1024
"""Ranges that the agent remembers (recall.h)."""
_EVERY = 8
"""Of the tokens decoded one by one, one in so many is held against what is parked."""
_LAYERS = 1
"""Layers whose keys are summarised."""


def settings_of(recall: Recall) -> tuple[tuple[int, int], ...]:
    """The numbers of a request: those of the settings, then the marked ranges."""
    most = (1 << 31) - 1
    mib_per_s = max(1, min(round(recall.bytes_per_s / (1 << 20)), 1 << 20))
    marked = [(min(part.start, most), min(part.stop, most)) for part in recall.marked]
    if len(marked) > _MOST_MARKED:  # those in between stay as well, rather than that one is forgotten
        rest = marked[_MOST_MARKED - 1 :]
        marked[_MOST_MARKED - 1 :] = [(min(rest)[0], max(stop for _, stop in rest))]
    return (
        (_MODES[recall.mode], _EVERY),
        (recall.sink_cells, recall.window_cells),
        (_LAYERS, int(recall.paused)),
        (mib_per_s, 0),
        *marked,
    )


def recalled(payload: bytes) -> Recalled:
    """What came of it so far."""
    if len(payload) < _RECALLED.size:
        return Recalled(why_not="the agent is of another version")
    return Recalled(
        **dict(zip(Recalled.__struct_fields__, _RECALLED.unpack_from(payload), strict=False)),
        why_not=payload[_RECALLED.size :].decode(errors="replace"),
    )
