"""One simulated KV cache: its sequences and saved states, and the bytes they have."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

from psi_kv_governor.cache import BlobState, CacheState
from psi_kv_governor.engines.simulated.sequence import PaperSequence
from psi_kv_governor.errors import EngineError

CELL_BYTES = 23_040
"""A cell of SmolLM2-135M in f16: 30 layers of K and V rows of 384 bytes each."""


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
        if number not in self.sequences:
            self.sequences[number] = PaperSequence(number, self.capacity_cells)
        return self.sequences[number]

    def decode(self, number: int, cells: int, now_s: float) -> int:
        """Decode tokens, and give how many parked cells came back for it. Raises EngineError when full."""
        used = 0
        for one in self.sequences.values():
            used += one.counts.used
        if used + cells > self.capacity_cells:
            raise EngineError(f"{cells} tokens more than {used} do not fit in {self.capacity_cells} cells")
        came_back = self.sequence(number).decode(cells, now_s)
        if self.free_resident_cells:
            self.free_resident_cells = max(0, self.free_resident_cells - cells)
        return came_back

    def truncate(self, number: int, length: int) -> None:
        """Forget the end of a sequence. Its pages stay until RELEASE, as llama.cpp leaves them."""
        self.free_resident_cells += self.sequence(number).truncate(length)

    @property
    def resident_bytes(self) -> int:
        cells, blobs = self.free_resident_cells, 0
        for one in self.sequences.values():
            cells += one.counts.resident
        for blob in self.blobs.values():
            blobs += 0 if blob.parked else blob.n_bytes
        return cells * self.cell_bytes + blobs

    @property
    def parked_bytes(self) -> int:
        cells = sum(one.counts.parked for one in self.sequences.values())
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
