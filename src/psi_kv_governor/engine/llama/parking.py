"""What of a sequence waits in a store, blob by blob."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from psi_kv_governor.policy.base import Range
from psi_kv_governor.store.base import BlobTag, Store


@dataclass
class Parked:
    """A spilled run of positions: its blob, and the part of it that has not come back or been dropped."""

    blob: Range
    wanted: Range
    tag: BlobTag
    store: Store
    key: int

    def part(self, cells: int, worth: Callable[[Range], float] | None) -> Range:
        """At most so many `cells` of what is wanted: its head, or its tail where that is worth more."""
        start, stop = self.wanted
        if cells >= stop - start:
            return self.wanted
        head, tail = Range(start, start + cells), Range(stop - cells, stop)
        return tail if worth and worth(tail) > worth(head) else head


class ParkingLot:
    """The blobs of one sequence, in the order of their positions."""

    def __init__(self) -> None:
        self._parked: list[Parked] = []

    def add(self, parked: Parked) -> None:
        """Enter a new blob. Its positions must not be parked already."""
        self._parked.append(parked)
        # By what is wanted: of a blob that came back in part, the first part may be in a newer blob by now.
        self._parked.sort(key=lambda entry: entry.wanted.start)

    def first(self, within: Range | None = None) -> Parked | None:
        """The blob with the lowest wanted position (of those with one `within`), or None."""
        for parked in self._parked:
            if within is None or (parked.wanted.start < within.stop and within.start < parked.wanted.stop):
                return parked
        return None

    def best(self, worth: Callable[[Range], float]) -> Parked | None:
        """The blob whose wanted part has the highest `worth`, the lowest position of equals; or None."""
        return max(self._parked, key=lambda parked: worth(parked.wanted), default=None)

    def forget(self, parked: Parked) -> None:
        """The blob is no longer wanted."""
        self._parked.remove(parked)
        parked.store.drop(parked.key)

    def drop(self, gone: Range) -> list[Range]:
        """Positions `gone` are no longer wanted. Gives the positions that are lost with them.

        A blob's wanted part is one run: when its middle goes, the part after it can't be kept.
        """
        orphans = []
        for parked in list(self._parked):
            start, stop = parked.wanted
            if gone.stop <= start or stop <= gone.start:
                continue
            if start < gone.start and gone.stop < stop:
                orphans.append(Range(gone.stop, stop))
            parked.wanted = Range(start, gone.start) if start < gone.start else Range(gone.stop, stop)
            if parked.wanted.cells <= 0:
                self.forget(parked)
        return orphans
