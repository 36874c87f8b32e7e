"""Where spilled ranges wait: the protocol of a store."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import msgspec


class BlobTag(msgspec.Struct, frozen=True, kw_only=True):
    """What a blob is of. A blob is only ever loaded into the same model, library, cache types and range."""

    model: str
    """Fingerprint of the model file."""
    library: str
    """Name and version of the engine's library."""
    layout: str
    """Cache types and row sizes of every tensor, as one fingerprint."""
    start: int
    """First position in the blob."""
    stop: int
    """Position after the last one in the blob."""


class Store(Protocol):
    """Keeps blobs until they are wanted again. Not thread safe: the engine calls it at safe points only."""

    @property
    def used_bytes(self) -> int:
        """Bytes that blobs take at the moment."""

    def room_bytes(self) -> int:
        """Bytes that a new blob may take, by the size limit and by the free space now."""

    def put(self, tag: BlobTag, n_bytes: int, chunks: Iterable[memoryview]) -> int:
        """Write a blob of `n_bytes` and give its key.

        A chunk's memory is used again for the next chunk, so it is taken before the next is asked for.
        Raises StoreFullError before anything is written when there is no room, StoreError when writing
        fails; in both cases nothing is kept.
        """

    def get(self, key: int, tag: BlobTag, buffers: Iterable[memoryview]) -> None:
        """Read blob `key` into `buffers` in the order written.

        Raises BlobCorruptError when the tag, the length or the checksum differs from what was put; the
        buffers may then hold anything and must not be used. The blob stays until `drop`.
        """

    def drop(self, key: int) -> None:
        """Forget a blob. Its space is free after the next `tidy` at the latest. Unknown keys are ignored."""

    def tidy(self) -> None:
        """Free the space of dropped blobs. May take time, and may be called from any thread."""

    def close(self) -> None:
        """Forget all blobs. Safe to call twice."""
