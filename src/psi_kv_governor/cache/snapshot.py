"""How the caches of an engine stand: plain data, the same in-process and over a socket."""

from __future__ import annotations

from enum import Enum

import msgspec

from psi_kv_governor.cache.ranges import Range, cells_in


class Domain(str, Enum):
    """Whose memory a cache is in."""

    HOST = "host"
    """Pages of a process: they can be parked one by one."""
    DEVICE = "device"
    """Memory of a device, and not the machine's: what is given back there helps nobody who is short here."""
    MANAGED = "managed"
    """One memory for both (unified-memory hosts), or it is not known: only whole buffers can be freed."""


class Capability(msgspec.Struct, frozen=True):
    """Whether an engine can do a step here, and where it can't, why and what to do."""

    able: bool
    why: str = ""


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """The steps of the ladder that an engine can do with its model on this machine."""

    release: Capability
    """Return the pages of cells nobody uses."""
    park: Capability
    """Move what is not being used to a file, from which reading brings it back."""
    mask: Capability
    """Have attention pass over parked cells of a running sequence."""
    blobs: Capability
    """Park saved states: a prompt cache, checkpoints."""
    evict: Capability = Capability(able=False, why="there is a place to park, so nothing is thrown away")
    """Drop content and decode it again later: only without a place to park."""


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine is."""

    engine: str
    """Its name in the entry-point group `psi_kv_governor.engines`."""
    capabilities: Capabilities
    domain: Domain = Domain.HOST
    backing: str = "memory"
    """Where the rows live: `file` (born in one, so that the kernel can take them by itself) or `memory`."""
    place: str = ""
    """Folder in which parked bytes are; empty where there is none."""
    details: dict[str, str] = {}
    """What else a person may want to know: versions, and the reason of a choice."""


class SequenceState(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence of a cache. Positions that are neither live nor masked nor lost were never decoded."""

    id: int
    next_position: int
    """The next position to be decoded: one more than the highest."""
    live: tuple[Range, ...]
    """Positions that attention looks at (sorted, disjoint)."""
    masked: tuple[Range, ...] = ()
    """Parked positions that attention does not look at: they come back by UNMASK."""
    lost: tuple[Range, ...] = ()
    """Positions whose content was dropped (EVICT): only decoding them again brings them back."""
    affected: int = 0
    """Tokens that were decoded while others were masked or lost, and still stand in the cache."""
    parked_bytes: int = 0
    """Of the live positions, bytes that are not resident: they come back by being read."""
    dirty_bytes: int = 0
    """Resident bytes that would have to be written before they can go; 0 where it is not known."""
    running: bool = False
    """Being decoded now, or within the last moments."""
    last_used_s: float = 0.0
    """Monotonic time of the last decode; 0 where there was none yet."""
    head_cells: int = 0
    """First positions that hold the system prompt; 0 where it is not known."""
    preempt_order: int | None = None
    """Running, and may be made to stand still whole (MASK without ranges), its tokens waiting until it is
    unmasked: 0 goes first. None where it may not, or where the engine masks ranges instead."""

    def parked_cells(self, cell_bytes: int) -> int:
        """Live positions that are not resident, in a cache of `cell_bytes` a cell."""
        return self.parked_bytes // cell_bytes if cell_bytes else 0

    @property
    def live_cells(self) -> int:
        """Positions that attention looks at."""
        return cells_in(self.live)

    @property
    def masked_cells(self) -> int:
        """Positions that are masked."""
        return cells_in(self.masked)

    @property
    def lost_cells(self) -> int:
        """Positions whose content was dropped."""
        return cells_in(self.lost)


class BlobState(msgspec.Struct, frozen=True, kw_only=True):
    """Saved state that is not being used: an entry of a prompt cache, a checkpoint."""

    id: int
    n_bytes: int
    parked: bool
    last_used_s: float = 0.0
    kind: str = "prompt"
    """`prompt` (an entry of a prompt cache) or `checkpoint`."""


class CacheState(msgspec.Struct, frozen=True, kw_only=True):
    """One KV cache."""

    id: int
    """Unique within the engine for as long as it lives."""
    name: str
    pid: int
    """Process that holds it."""
    capacity_cells: int
    cell_bytes: int
    """Bytes of one cell: its K and V rows in every layer."""
    row_bytes: int
    """Bytes of the shortest row of a cell: so many rows fill a page."""
    resident_bytes: int
    """Bytes of it in memory now, counted by the kernel where it lets us."""
    maskable: bool
    """Whether parked cells of a running sequence can be masked, so that they are not read."""
    why_not_maskable: str = ""
    evictable: bool = True
    """Whether content of its sequences can be dropped, where the engine can do that at all (EVICT)."""
    free_resident_bytes: int = 0
    """Resident bytes of cells nobody uses: what RELEASE would return."""
    free_soon_used_bytes: int = 0
    """Of these, what the engine gives away next while it works: not released for tidiness alone."""
    frees_swap: bool = False
    """Cells nobody uses take a MiB or more of swap, where RELEASE frees them without reading them: in zram
    that is memory."""
    rebuilt: bool = False
    """Each change of its size makes all of it anew: nothing is released for tidiness alone, and what comes
    back comes at once and not in slices."""
    sequences: tuple[SequenceState, ...] = ()
    blobs: tuple[BlobState, ...] = ()


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All caches of an engine at one moment."""

    time_s: float
    """Monotonic time."""
    caches: tuple[CacheState, ...] = ()
    written_bytes: int = 0
    """Bytes that were written to files by us or for us, since the engine began: the wear of the disk."""
    store_bytes: int = 0
    """Space that parked bytes take on disk."""
