"""What stands in the file of a governor for its neighbours: checksum, length and MessagePack."""

from __future__ import annotations

import os
import zlib

import msgspec

_MOST_BYTES = 4096


class Notice(msgspec.Struct, frozen=True, array_like=True):
    """The content of a file."""

    pids: tuple[int, ...]
    pid_space: str
    levels: tuple[str, ...]
    time_s: float
    last_used_s: float
    trimmable_bytes: int
    masked_bytes: int
    restoring: bool
    claim_bytes: int
    resident_bytes: int
    work: tuple[tuple[float, float], ...]


def packed(notice: Notice) -> bytes:
    """The content of a file; who reads while it is written finds a wrong checksum."""
    body = msgspec.msgpack.encode(notice)
    return zlib.crc32(body).to_bytes(4, "big") + len(body).to_bytes(4, "big") + body


def read_notice(descriptor: int) -> Notice | None:
    """What is said there; None where it is being written, or is not of this kind."""
    try:
        data = os.pread(descriptor, _MOST_BYTES, 0)
        body = data[8 : 8 + int.from_bytes(data[4:8], "big")]
        if len(data) < 8 or zlib.crc32(body) != int.from_bytes(data[:4], "big"):
            return None
        return msgspec.msgpack.decode(body, type=Notice)
    except (OSError, msgspec.DecodeError):
        return None
