"""A store in memory: hundreds of trims a minute, and nothing but the model is measured."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count

from psi_kv_governor.errors import BlobCorruptError
from psi_kv_governor.store.base import BlobTag


class MemoryStore:
    """Keeps blobs in this process. No memory is saved by it: a benchmark's store, never a governor's."""

    def __init__(self) -> None:
        self._blobs: dict[int, tuple[BlobTag, bytes]] = {}
        self._keys = count()

    @property
    def used_bytes(self) -> int:
        """Bytes that blobs take at the moment."""
        return sum(len(data) for _, data in self._blobs.values())

    def room_bytes(self) -> int:
        """No limit: the benchmark's contexts are small."""
        return 1 << 62

    def put(self, tag: BlobTag, n_bytes: int, chunks: Iterable[memoryview]) -> int:
        """See Store.put."""
        data = b"".join(chunks)
        if len(data) != n_bytes:
            raise ValueError(f"{len(data)} bytes came for a blob of {n_bytes}")
        key = next(self._keys)
        self._blobs[key] = (tag, data)
        return key

    def get(self, key: int, tag: BlobTag, buffers: Iterable[memoryview]) -> None:
        """See Store.get."""
        kept_tag, data = self._blobs[key]
        start = 0
        for buffer in buffers:
            flat = buffer.cast("B")
            flat[:] = data[start : start + len(flat)]
            start += len(flat)
        if kept_tag != tag or start != len(data):
            raise BlobCorruptError(f"blob {key} is not what was asked for")

    def drop(self, key: int) -> None:
        """See Store.drop."""
        self._blobs.pop(key, None)

    def tidy(self) -> None:
        """See Store.tidy: a dropped blob's memory is free at once."""

    def close(self) -> None:
        """See Store.close."""
        self._blobs.clear()
