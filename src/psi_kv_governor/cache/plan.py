"""What is asked of an engine, and what was really done: plain data, the same over a socket."""

from __future__ import annotations

import math
from enum import Enum

import msgspec

from psi_kv_governor.cache.ranges import Range


class Verb(str, Enum):
    """One kind of step. The first five give memory up, in the order of what they cost later."""

    WRITE_BEHIND = "write-behind"
    """Write dirty pages while the machine is merely busy, so that later steps copy nothing."""
    RELEASE = "release"
    """Return the pages of cells nobody uses."""
    PARK = "park"
    """Park sequences that are not being decoded, or blobs: no fidelity is lost."""
    MASK = "mask"
    """Park ranges of a running sequence and have attention pass over them."""
    EVICT = "evict"
    """Drop the content of ranges: only where there is no place to park."""
    UNMASK = "unmask"
    """Bring masked ranges back into memory, and have attention look at them again."""
    UNPARK = "unpark"
    """Read parked sequences or blobs back before somebody needs them."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to do with one cache.

    Without ranges the whole sequence is meant, without a sequence all that the verb applies to.
    """

    verb: Verb
    cache: int = 0
    """`CacheState.id`."""
    sequence: int | None = None
    ranges: tuple[Range, ...] = ()
    """Positions of `sequence`, sorted and disjoint."""
    blob: int | None = None
    """`BlobState.id`: this blob and nothing else."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Steps in order. The engine stops, between steps or inside one, where the time or the bytes are up."""

    steps: tuple[Step, ...]
    deadline_s: float = math.inf
    """Seconds from the call after which nothing new is begun."""
    max_bytes: int | None = None
    """Stop when so many bytes went (or came back): the slice of a restore. None: no bound."""
    urgent: bool = False
    """Memory is about to be gone: the cheapest bytes first, and nothing that can wait is waited for."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What was really done."""

    bytes_returned: int = 0
    """Resident bytes that the operating system has again: counted by the kernel, not computed."""
    bytes_back: int = 0
    """Bytes that became resident by UNMASK and UNPARK."""
    cells: int = 0
    """Cells parked, masked, evicted or brought back by this plan."""
    masked: int = 0
    """Of these, the ones that attention passes over from now on."""
    lost: int = 0
    """Of these, the ones whose content was dropped: only decoding them again brings them back."""
    written_bytes: int = 0
    """Bytes that had to be written for it."""
    done: bool = True
    """False where the deadline or the bytes were up before the last step."""
    seconds: float = 0.0
    problem: str = ""
    """Why less than asked was done, in one clause; empty when all went well."""

    def plus(self, other: Result) -> Result:
        """Both, one after the other. Of two problems the first is told."""
        return Result(
            bytes_returned=self.bytes_returned + other.bytes_returned,
            bytes_back=self.bytes_back + other.bytes_back,
            cells=self.cells + other.cells,
            masked=self.masked + other.masked,
            lost=self.lost + other.lost,
            written_bytes=self.written_bytes + other.written_bytes,
            done=self.done and other.done,
            seconds=self.seconds + other.seconds,
            problem=self.problem or other.problem,
        )
