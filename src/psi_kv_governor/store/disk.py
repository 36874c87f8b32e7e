"""The disk store: each blob in a file without a name, checksummed, tagged, past the page cache."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import platformdirs

from psi_kv_governor.errors import BadInputError, BlobCorruptError, StoreError, StoreFullError
from psi_kv_governor.store.base import BlobTag
from psi_kv_governor.store.blob import HEADER_BYTES, Blob, flat, header, words
from psi_kv_governor.store.checksum import Mac, pick_mac
from psi_kv_governor.store.files import (
    BLOCK_BYTES,
    is_full,
    open_unlinked,
    page_buffer,
    reserve,
    takes_direct,
)
from psi_kv_governor.store.mounts import memory_backed
from psi_kv_governor.store.stream import BlobReader, BlobWriter, padded

BOUNCE_BYTES = 2 << 20
"""Size of the one buffer that everything goes through. 83 MB in 64 pieces of odd sizes, on a virtual disk
of 7 GB/s: put 1.16 GB/s with 128 KiB, 1.25 with 1 MiB, 1.38 with 2 MiB, 1.32 with 4 MiB; get 1.05, 0.97,
1.25, 1.24. Two thirds of that time is the checksum."""

_SAMPLE_BYTES = 64 << 10  # what the checksums are tried on: 0.2 ms in all
_FADE = 0.5  # weight that the past keeps in the measured speed when one more blob is written


_NEEDED = ("O_DIRECT", "posix_fadvise", "posix_fallocate", "preadv")
"""Without these, what is spilled would wait in the page cache, which is memory."""


def default_directory() -> Path:
    """Where spilled ranges wait unless told otherwise."""
    return Path(platformdirs.user_cache_dir("psi-kv")) / "spill"


class DiskStore:
    """Keeps each blob in one unlinked file of `directory` (see store/base.py for the protocol).

    A file has no name from birth, so nobody else finds it and nothing of it outlives the process, however
    it ends. All I/O goes through one page-aligned buffer made beforehand, with O_DIRECT where the
    filesystem takes it, and otherwise with every block dropped from the page cache: spilling under memory
    pressure must not take memory. Checksums and tags stay in this process's memory, so that a file which
    was changed, or is of something else, never passes.
    """

    def __init__(
        self,
        directory: Path | None = None,
        limit_bytes: int = 8 << 30,
        reserve_bytes: int = 512 << 20,
        *,
        proc: Path = Path("/proc"),
    ) -> None:
        """Use at most `limit_bytes` of `directory` (made 0700 when absent); leave `reserve_bytes` free.

        Raises BadInputError when a folder that was asked for cannot be used, and StoreError when the
        default one (None) cannot: the first is to be put right, the second to be lived with.
        """
        unusable = StoreError if directory is None else BadInputError
        if missing := [name for name in _NEEDED if not hasattr(os, name)]:
            raise unusable(f"the disk store needs Linux (no {', '.join(missing)} here): set store = 'none'")
        self._directory = (directory or default_directory()).expanduser().absolute()
        self._limit_bytes = limit_bytes
        self._reserve_bytes = reserve_bytes
        self._blobs: dict[int, Blob] = {}
        self._next_key = 1
        self._used_bytes = 0
        self._written_bytes = 0.0
        self._written_s = 0.0
        memory = page_buffer(BOUNCE_BYTES)
        self._bounce = memoryview(memory)
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if why := memory_backed(self._directory, proc):
                raise unusable(
                    f"spilling to {self._directory} returns nothing: {why}; point store_dir at a disk"
                )
            self._direct = takes_direct(self._directory, self._bounce)
        except OSError as error:
            raise unusable(
                f"cannot spill to {self._directory}: {error.strerror}; point store_dir at a writable folder"
            ) from error
        self._new_mac: Callable[[], Mac] = pick_mac(self._bounce[:_SAMPLE_BYTES])
        self._open = True
        self._busy = False
        self._dropped: list[int] = []
        weakref.finalize(self, _close_files, self._blobs)  # a store that is just forgotten keeps no disk
        weakref.finalize(self, _close_descriptors, self._dropped)

    @property
    def directory(self) -> Path:
        """The folder in use."""
        return self._directory

    @property
    def direct(self) -> bool:
        """Whether the page cache is passed by (O_DIRECT), and not only cleaned after each block."""
        return self._direct

    @property
    def used_bytes(self) -> int:
        """Bytes of disk that blobs take at the moment."""
        return self._used_bytes

    @property
    def write_bytes_per_s(self) -> float | None:
        """Speed of the last few `put`s, the newest weighing most; None before the first one."""
        return self._written_bytes / self._written_s if self._written_s > 0 else None

    def room_bytes(self) -> int:
        """Bytes that a new blob may take; a `put` of that many passes, of one more does not."""
        if not self._open or len(self._blobs) >= _most_blobs():
            return 0
        try:
            room = min(self._limit_bytes - self._used_bytes, self._free_bytes())
        except StoreError:
            return 0
        return max(0, room // BLOCK_BYTES * BLOCK_BYTES - HEADER_BYTES)

    def put(self, tag: BlobTag, n_bytes: int, chunks: Iterable[memoryview]) -> int:
        """Write a blob; see `Store.put`. Also raises StoreError when `chunks` are not `n_bytes` long."""
        with self._alone():
            return self._put(tag, n_bytes, chunks)

    def get(self, key: int, tag: BlobTag, buffers: Iterable[memoryview]) -> None:
        """Read a blob; see `Store.get`. Also raises StoreError when the key is unknown or the disk fails."""
        with self._alone():
            self._get(key, tag, buffers)

    def drop(self, key: int) -> None:
        """Forget a blob. Its space is freed by `tidy`, or by a `put` that needs it."""
        blob = self._blobs.pop(key, None)
        if blob is not None:
            self._used_bytes -= blob.file_bytes
            self._dropped.append(blob.descriptor)

    def tidy(self) -> None:
        """Free the space of dropped blobs.

        Not done in `drop`: where the filesystem discards freed blocks at once, closing an unlinked file of
        16 MiB took 20 ms, which was half of the time of a restore.
        """
        _close_descriptors(self._dropped)

    def close(self) -> None:
        """Forget all blobs. Safe to call twice."""
        self._open = False
        self._used_bytes = 0
        _close_files(self._blobs)
        self.tidy()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuse a second use while one is under way (from a chunk's own making, or another thread).

        Both would share the buffer, and a `put` would keep wrong bytes under a right checksum.
        """
        if self._busy:
            raise StoreError("the store is in the middle of another blob")
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _put(self, tag: BlobTag, n_bytes: int, chunks: Iterable[memoryview]) -> int:
        self._check_room(n_bytes)
        key = self._next_key
        file_bytes = padded(HEADER_BYTES + n_bytes)
        started = time.perf_counter()
        descriptor = self._new_file(file_bytes)
        try:
            writer = BlobWriter(descriptor, self._bounce, self._new_mac(), direct=self._direct)
            writer.add(memoryview(header(key, tag, n_bytes)))
            for view in map(flat, chunks):
                if writer.taken_bytes + len(view) > HEADER_BYTES + n_bytes:
                    raise StoreError(f"a blob of {n_bytes} bytes was announced, and more came")
                with self._told("write to"):
                    writer.add(view)
            if (came := writer.taken_bytes - HEADER_BYTES) != n_bytes:
                raise StoreError(f"a blob of {n_bytes} bytes was announced, and {came} came")
            with self._told("write to"):
                digest = writer.finish()
        except BaseException:
            os.close(descriptor)
            raise
        self._note_speed(n_bytes, time.perf_counter() - started)
        self._blobs[key] = Blob(descriptor, tag, n_bytes, file_bytes, digest)
        self._used_bytes += file_bytes
        self._next_key += 1
        return key

    def _get(self, key: int, tag: BlobTag, buffers: Iterable[memoryview]) -> None:
        blob = self._blobs.get(key)
        if blob is None:
            raise StoreError(f"the store has no blob {key}")
        if blob.tag != tag:
            raise BlobCorruptError(f"blob {key} is of {words(blob.tag)}, not of {words(tag)}")
        reader = BlobReader(blob.descriptor, self._bounce, self._new_mac(), blob.file_bytes)
        head = bytearray(HEADER_BYTES)
        with self._told("read from"):
            reader.take(memoryview(head))
        if head != header(key, tag, blob.n_bytes):
            raise BlobCorruptError(f"blob {key} is not the file that was written")
        left = blob.n_bytes
        for view in map(flat, buffers):
            left -= len(view)
            if left < 0:
                break
            with self._told("read from"):
                reader.take(view)
        if left != 0:
            raise BlobCorruptError(f"blob {key} has {blob.n_bytes} bytes, and another number was asked for")
        with self._told("read from"):
            digest = reader.finish()
        if digest != blob.digest:
            raise BlobCorruptError(f"blob {key} was changed on disk: its checksum differs")

    def _check_room(self, n_bytes: int) -> None:
        if not self._open:
            raise StoreError("the store is closed")
        if n_bytes < 0:
            raise StoreError(f"a blob cannot have {n_bytes} bytes")
        needed = padded(HEADER_BYTES + n_bytes)
        if self._dropped and (
            len(self._blobs) + len(self._dropped) >= _most_blobs() or needed > self._free_bytes()
        ):
            self.tidy()
        if len(self._blobs) >= (most := _most_blobs()):
            raise StoreFullError(
                f"{most} blobs are kept, half of the files this process may open (ulimit -n)"
            )
        if self._used_bytes + needed > self._limit_bytes:
            raise StoreFullError(
                f"{needed} bytes more would pass the store's limit, {self._limit_bytes}: "
                f"{self._used_bytes} are used"
            )
        if needed > (free := self._free_bytes()):
            raise StoreFullError(
                f"{needed} bytes more would eat the disk's reserve: {max(0, free)} are left above it "
                f"in {self._directory}"
            )

    def _free_bytes(self) -> int:
        """Free space above the reserve; less than 0 when the reserve itself is touched."""
        try:
            stat = os.statvfs(self._directory)
        except OSError as error:
            raise StoreError(f"{self._directory} cannot be used any more: {error.strerror}") from error
        return stat.f_bavail * stat.f_frsize - self._reserve_bytes

    def _new_file(self, file_bytes: int) -> int:
        # A folder that vanished is not made again: its disk may be unmounted, and what lies under the mount
        # point may well be memory.
        with self._told("write to"):
            descriptor = open_unlinked(self._directory, direct=self._direct)
            try:
                if self._direct:
                    reserve(descriptor, file_bytes)
            except BaseException:
                os.close(descriptor)
                raise
            return descriptor

    def _note_speed(self, n_bytes: int, seconds: float) -> None:
        self._written_bytes = self._written_bytes * _FADE + n_bytes
        self._written_s = self._written_s * _FADE + seconds

    @contextlib.contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        """Turn an OSError into the store's own, with one line."""
        try:
            yield
        except OSError as error:
            kind = StoreFullError if is_full(error) else StoreError
            raise kind(f"cannot {doing} {self._directory}: {error.strerror}") from error


def _close_descriptors(descriptors: list[int]) -> None:
    with contextlib.suppress(IndexError):  # the last one; also when another thread took it
        while True:
            os.close(descriptors.pop())


def _close_files(blobs: dict[int, Blob]) -> None:
    for blob in blobs.values():
        os.close(blob.descriptor)
    blobs.clear()


def _most_blobs() -> int:
    """Each blob is an open file: half of what the process may open stays with the rest of the program."""
    import resource  # here, because Windows has none

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft // 2
