"""One KV cache on paper: where each position of its sequences is, and which of them are resident."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import msgspec
import numpy as np
import numpy.typing as npt

from psi_kv_governor.cache import BlobState, CacheState, Range, SequenceState
from psi_kv_governor.errors import EngineError

CELL_BYTES = 23_040
"""A cell of SmolLM2-135M in f16: 30 layers of K and V rows of 384 bytes each."""

RUNNING_S = 1.0
"""A sequence that was decoded within so long is running: between two tokens of a slow machine."""

_NEVER, _LIVE, _MASKED, _LOST = 0, 1, 2, 3

_Cells = npt.NDArray[np.bool_]


class PaperSequence:
    """Positions of one sequence. What takes ranges gives the number of cells that it really changed."""

    def __init__(self, number: int, capacity: int) -> None:
        self.id = number
        self.next_position = 0
        self.last_used_s = 0.0
        self.head_cells = 0
        self.running: bool | None = None
        """Set by hand; None: by the time of the last decode."""
        self._place = np.zeros(capacity, np.uint8)
        self._resident = np.zeros(capacity, bool)
        self._written = np.zeros(capacity, bool)
        self._affected = np.zeros(capacity, bool)
        self._told: SequenceState | None = None

    @property
    def resident_cells(self) -> int:
        """Live cells in memory: what is masked or lost never is."""
        return int(np.count_nonzero(self._resident))

    @property
    def used_cells(self) -> int:
        """Cells of the cache that are this sequence's, parked or not."""
        return int(np.count_nonzero(self._place))

    @property
    def parked_cells(self) -> int:
        """Cells whose only copy is in a file."""
        kept = (self._place == _LIVE) | (self._place == _MASKED)
        return int(np.count_nonzero(kept & ~self._resident))

    def decode(self, cells: int, now_s: float) -> int:
        """Append `cells` tokens. All live positions are read for it: parked ones are resident again, and
        their number is given."""
        live = self._place == _LIVE
        came_back = int(np.count_nonzero(live & ~self._resident))
        self._resident |= live
        new = slice(self.next_position, self.next_position + cells)
        away = bool(np.isin(self._place, (_MASKED, _LOST)).any())
        self._place[new], self._resident[new], self._affected[new] = _LIVE, True, away
        self._written[new] = False
        self.next_position += cells
        self.last_used_s = now_s
        self._told = None
        return came_back

    def truncate(self, length: int) -> int:
        """Forget the positions from `length` on. Gives how many of them were resident."""
        freed = int(np.count_nonzero(self._resident[length:]))
        for cells in (self._place, self._resident, self._written, self._affected):
            cells[length:] = 0
        self.next_position = min(self.next_position, length)
        self._told = None
        return freed

    def park(self, ranges: tuple[Range, ...], most: int) -> tuple[int, int]:
        """Cells parked, and those of them that had to be written for it."""
        chosen = self._first(self._within(ranges) & self._resident, most)
        return self._leave(chosen, _LIVE)

    def mask(self, ranges: tuple[Range, ...], most: int) -> tuple[int, int, int]:
        """Cells masked, those of them that were resident, and those that had to be written."""
        chosen = self._first(self._within(ranges) & (self._place == _LIVE), most)
        resident, written = self._leave(chosen, _MASKED)
        return int(np.count_nonzero(chosen)), resident, written

    def evict(self, ranges: tuple[Range, ...], most: int) -> tuple[int, int]:
        """Cells dropped, and those of them that were resident."""
        chosen = self._first(self._within(ranges) & (self._place == _LIVE), most)
        resident = int(np.count_nonzero(chosen & self._resident))
        self._place[chosen], self._resident[chosen], self._written[chosen] = _LOST, False, False
        self._told = None
        return int(np.count_nonzero(chosen)), resident

    def unmask(self, ranges: tuple[Range, ...], most: int) -> int:
        """Cells that are live and resident again. Their copy in the file stays good."""
        chosen = self._first(self._within(ranges) & (self._place == _MASKED), most)
        self._place[chosen], self._resident[chosen] = _LIVE, True
        self._told = None
        return int(np.count_nonzero(chosen))

    def unpark(self, ranges: tuple[Range, ...], most: int) -> int:
        """Live cells that are resident again."""
        chosen = self._first(self._within(ranges) & (self._place == _LIVE) & ~self._resident, most)
        self._resident[chosen] = True
        self._told = None
        return int(np.count_nonzero(chosen))

    def write(self, ranges: tuple[Range, ...], most: int) -> int:
        """Dirty cells that have a copy in the file now."""
        chosen = self._first(self._within(ranges) & self._resident & ~self._written, most)
        self._written[chosen] = True
        self._told = None
        return int(np.count_nonzero(chosen))

    def unmask_all(self) -> None:
        """The engine leaves: what is masked is read from the file like anything parked."""
        self._place[self._place == _MASKED] = _LIVE
        self._told = None

    def known(self, part: Range) -> _Cells:
        """Which positions of `part` are live, shape (part.cells,)."""
        return np.asarray(self._place[part.start : part.stop] == _LIVE)

    def state(self, cell_bytes: int, now_s: float) -> SequenceState:
        """How it stands. Between two changes of its cells it is not looked at again."""
        if self._told is None:
            used = self._place[: self.next_position]
            resident = self._resident[: self.next_position]
            dirty = resident & ~self._written[: self.next_position]
            self._told = SequenceState(
                id=self.id,
                next_position=self.next_position,
                live=_runs(used == _LIVE),
                masked=_runs(used == _MASKED),
                lost=_runs(used == _LOST),
                affected=int(np.count_nonzero(self._affected)),
                parked_bytes=int(np.count_nonzero((used == _LIVE) & ~resident)) * cell_bytes,
                dirty_bytes=int(np.count_nonzero(dirty)) * cell_bytes,
                last_used_s=self.last_used_s,
                head_cells=self.head_cells,
            )
        running = self.running
        if running is None:
            running = self.next_position > 0 and now_s - self.last_used_s < RUNNING_S
        return _running(self._told, running)

    def _leave(self, chosen: _Cells, place: int) -> tuple[int, int]:
        resident = int(np.count_nonzero(chosen & self._resident))
        written = int(np.count_nonzero(chosen & ~self._written))
        self._place[chosen], self._resident[chosen], self._written[chosen] = place, False, True
        self._told = None
        return resident, written

    def _within(self, ranges: tuple[Range, ...]) -> _Cells:
        """The positions of `ranges`, all without any; what was never decoded is in none."""
        if not ranges:
            return np.ones(len(self._place), bool)
        inside = np.zeros(len(self._place), bool)
        for part in ranges:
            inside[part.start : part.stop] = True
        return inside

    @staticmethod
    def _first(chosen: _Cells, most: int) -> _Cells:
        """The first `most` of what is chosen."""
        if np.count_nonzero(chosen) > most:
            chosen[np.flatnonzero(chosen)[most:]] = False
        return chosen


def _running(state: SequenceState, running: bool) -> SequenceState:
    return msgspec.structs.replace(state, running=running) if state.running is not running else state


def _runs(chosen: _Cells) -> tuple[Range, ...]:
    edges = np.flatnonzero(np.diff(chosen.astype(np.int8), prepend=0, append=0))
    return tuple(Range(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True))


class PaperBlob:
    """A saved state."""

    def __init__(self, number: int, n_bytes: int, now_s: float, kind: str) -> None:
        self.id, self.n_bytes, self.kind = number, n_bytes, kind
        self.last_used_s = now_s
        self.parked = False
        self.written = False

    @property
    def state(self) -> BlobState:
        return BlobState(
            id=self.id,
            n_bytes=self.n_bytes,
            parked=self.parked,
            last_used_s=self.last_used_s,
            kind=self.kind,
        )


class PaperCache:
    """One cache: sequences and blobs by their numbers, and cells that nobody uses any more."""

    def __init__(
        self, number: int, capacity_cells: int, cell_bytes: int, *, name: str, pid: int, why_not_maskable: str
    ) -> None:
        self.id, self.capacity_cells, self.cell_bytes = number, capacity_cells, cell_bytes
        self.name, self.pid, self.why_not_maskable = name, pid, why_not_maskable
        self.sequences: dict[int, PaperSequence] = {}
        self.blobs: dict[int, PaperBlob] = {}
        self.free_resident_cells = 0
        """Resident cells nobody uses: decoding takes them first, RELEASE returns them."""

    def sequence(self, number: int) -> PaperSequence:
        """That sequence; a new one where there is none."""
        return self.sequences.setdefault(number, PaperSequence(number, self.capacity_cells))

    def decode(self, number: int, cells: int, now_s: float) -> int:
        """Decode tokens, and give how many parked cells came back for it. Raises EngineError when full."""
        used = sum(one.used_cells for one in self.sequences.values())
        if used + cells > self.capacity_cells:
            raise EngineError(f"{cells} tokens more than {used} do not fit in {self.capacity_cells} cells")
        came_back = self.sequence(number).decode(cells, now_s)
        self.free_resident_cells = max(0, self.free_resident_cells - cells)
        return came_back

    def truncate(self, number: int, length: int) -> None:
        """Forget the end of a sequence. Its pages stay until RELEASE, as llama.cpp leaves them."""
        self.free_resident_cells += self.sequence(number).truncate(length)

    @property
    def resident_bytes(self) -> int:
        cells = self.free_resident_cells + sum(one.resident_cells for one in self.sequences.values())
        blobs = sum(blob.n_bytes for blob in self.blobs.values() if not blob.parked)
        return cells * self.cell_bytes + blobs

    @property
    def parked_bytes(self) -> int:
        cells = sum(one.parked_cells for one in self.sequences.values())
        return cells * self.cell_bytes + sum(blob.n_bytes for blob in self.blobs.values() if blob.parked)

    def of(self, number: int | None) -> Iterator[PaperSequence]:
        """That sequence, where there is such a one; all of them for None."""
        if number is None:
            yield from self.sequences.values()
        elif number in self.sequences:
            yield self.sequences[number]

    def state(self, now_s: float) -> CacheState:
        return CacheState(
            id=self.id,
            name=self.name,
            pid=self.pid,
            capacity_cells=self.capacity_cells,
            cell_bytes=self.cell_bytes,
            row_bytes=mmap.PAGESIZE,  # it has no pages: a row of any length comes free
            resident_bytes=self.resident_bytes,
            maskable=not self.why_not_maskable,
            why_not_maskable=self.why_not_maskable,
            free_resident_bytes=self.free_resident_cells * self.cell_bytes,
            sequences=tuple(one.state(self.cell_bytes, now_s) for one in self.sequences.values()),
            blobs=tuple(blob.state for blob in self.blobs.values()),
        )
