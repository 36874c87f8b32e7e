"""Bytes of any length to and from a file, through one aligned buffer, under one checksum."""

from __future__ import annotations

from psi_kv_governor.errors import BlobCorruptError
from psi_kv_governor.store.checksum import Mac
from psi_kv_governor.store.files import BLOCK_BYTES, read_block, write_block


def padded(n_bytes: int) -> int:
    """`n_bytes` rounded up to whole blocks."""
    return -(-n_bytes // BLOCK_BYTES) * BLOCK_BYTES


class BlobWriter:
    """Gathers bytes in `bounce`; each full buffer is taken into `mac` and written. Raises OSError."""

    def __init__(self, descriptor: int, bounce: memoryview, mac: Mac, *, direct: bool) -> None:
        self.taken_bytes = 0
        """Bytes that were added so far."""
        self._descriptor = descriptor
        self._bounce = bounce
        self._mac = mac
        self._direct = direct
        self._filled = 0
        self._offset = 0

    def add(self, view: memoryview) -> None:
        """Take all of `view` (bytes, contiguous); its memory is free for other use afterwards."""
        done = 0
        while done < len(view):
            n = min(len(view) - done, len(self._bounce) - self._filled)
            self._bounce[self._filled : self._filled + n] = view[done : done + n]
            self._filled += n
            done += n
            if self._filled == len(self._bounce):
                self._flush()
        self.taken_bytes += len(view)

    def finish(self) -> bytes:
        """Write what is left, padded with zeros to a whole block. Gives the checksum of everything."""
        if self._filled:
            end = padded(self._filled)
            self._bounce[self._filled : end] = bytes(end - self._filled)
            self._filled = end
            self._flush()
        return self._mac.digest()

    def _flush(self) -> None:
        # Hashed here and not chunk by chunk: the buffer is still in the processor's cache from the copy.
        block = self._bounce[: self._filled]
        self._mac.update(block)
        write_block(self._descriptor, block, self._offset, direct=self._direct)
        self._offset += self._filled
        self._filled = 0


class BlobReader:
    """Reads a file of `file_bytes` buffer by buffer into `bounce` and `mac`, and hands out its bytes."""

    def __init__(self, descriptor: int, bounce: memoryview, mac: Mac, file_bytes: int) -> None:
        self._descriptor = descriptor
        self._bounce = bounce
        self._mac = mac
        self._file_bytes = file_bytes
        self._offset = 0
        self._ready = bounce[:0]

    def take(self, into: memoryview) -> None:
        """Fill all of `into` (bytes, contiguous). Raises OSError; BlobCorruptError when the file is short."""
        done = 0
        while done < len(into):
            if not self._ready:
                self._load()
            n = min(len(into) - done, len(self._ready))
            into[done : done + n] = self._ready[:n]
            self._ready = self._ready[n:]
            done += n

    def finish(self) -> bytes:
        """Read what is left, padding too. Gives the checksum of the whole file."""
        while self._offset < self._file_bytes:
            self._load()
        return self._mac.digest()

    def _load(self) -> None:
        block = self._bounce[: min(len(self._bounce), self._file_bytes - self._offset)]
        if not block or read_block(self._descriptor, block, self._offset) != len(block):
            raise BlobCorruptError("the file of a blob is shorter than it was written")
        self._mac.update(block)
        self._offset += len(block)
        self._ready = block
