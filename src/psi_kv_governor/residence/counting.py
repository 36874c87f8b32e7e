"""What of a mapping is in memory, as the kernel counts it, or as well as it lets us count."""

from __future__ import annotations

from collections.abc import Sequence

from psi_kv_governor.kernel import memory
from psi_kv_governor.kernel.memory import Mask
from psi_kv_governor.residence.parked_file import ParkedFile
from psi_kv_governor.residence.parts import Part, bytes_of


def in_memory(address: int, part: Part) -> tuple[Mask | None, str]:
    """By page, whether it is in memory, and by what that is known; see `Done.counted`."""
    start, n_bytes = address + part[0], part[1] - part[0]
    mask = memory.in_memory(start, n_bytes)
    if mask is not None:
        return mask, "mincore"
    table = memory.page_table(start, n_bytes)
    return (table[0], "pagemap") if table else (None, "computed")


def went(address: int, parts: Sequence[Part], before: Sequence[Mask | None]) -> tuple[int, str]:
    """Bytes of `parts` that were in memory `before` and are not now, and by what that was counted."""
    returned, how = 0, "mincore"
    for part, was in zip(parts, before, strict=True):
        now, how = in_memory(address, part)
        returned += part[1] - part[0] if was is None or now is None else bytes_of(was & ~now)
    return returned, how


def dirty_bytes(address: int, part: Part, file: ParkedFile | None) -> int | None:
    """Bytes of `part` that would have to be written before they can go: in the page cache of the `file` that
    it shares, else the pages of its own. None where that can't be told."""
    if file is not None:
        return memory.dirty_file_bytes(file.descriptor, part[0], part[1] - part[0])
    table = memory.page_table(address + part[0], part[1] - part[0])
    return bytes_of(table[1]) if table else None
