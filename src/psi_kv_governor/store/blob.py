"""What stands at the head of a blob's file, and what is remembered of it."""

from __future__ import annotations

import hashlib
import struct
from typing import NamedTuple

import msgspec

from psi_kv_governor.store.base import BlobTag

_HEADER = struct.Struct("<8sQQ32s")  # magic, key, bytes of the body, fingerprint of the tag
_MAGIC = b"psi-kv\x00\x01"

HEADER_BYTES = _HEADER.size
"""The same for every tag, so that the room for a blob can be told to the byte."""


class Blob(NamedTuple):
    """One blob: where it is, what it is of, and what its file must look like."""

    descriptor: int
    tag: BlobTag
    n_bytes: int
    """Bytes of the body."""
    file_bytes: int
    """Bytes of the file: header and body in whole blocks."""
    digest: bytes
    """Keyed checksum of the whole file."""


def header(key: int, tag: BlobTag, n_bytes: int) -> bytes:
    """The file's first HEADER_BYTES."""
    fingerprint = hashlib.sha256(msgspec.json.encode(tag)).digest()
    return _HEADER.pack(_MAGIC, key, n_bytes, fingerprint)


def words(tag: BlobTag) -> str:
    """A tag in a message."""
    return f"{tag.model}, {tag.library}, {tag.layout}, positions {tag.start} to {tag.stop}"


def flat(view: memoryview) -> memoryview:
    """`view` as plain bytes; a cast refuses shapes with a zero in them."""
    return memoryview(view).cast("B") if view.nbytes else memoryview(b"")
