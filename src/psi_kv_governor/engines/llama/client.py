"""Speaks with an agent: one message there, one back, the same in-process and over a socket (protocol.h)."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from psi_kv_governor.cache import Range
from psi_kv_governor.errors import EngineError

VERSION = 1
_REQUEST = struct.Struct("<IIIiIIQd")
_REPLY = struct.Struct("<iIQQQQdII")
_REGION = struct.Struct("<II8QdIIQ96s")
_SEQUENCE = struct.Struct("<8id")
_BLOB = struct.Struct("<IIQd")
_BUFFER = struct.Struct("<IIIIQQ64s")
NO_SUCH = 1
"""Status of a reply: the cache or the sequence is gone."""


class Op(IntEnum):
    """What is asked of an agent."""

    HELLO = 1
    SNAPSHOT = 2
    SEQUENCE = 3
    MASK = 4
    UNMASK = 5
    PARK = 6
    UNPARK = 7
    WRITE = 8
    RELEASE = 9
    EVIDENCE = 10
    COLLECT = 11
    FORGET = 12
    BLOBS = 13
    PARK_BLOB = 14
    REFUSE = 15
    SAMPLED = 16
    BUFFERS = 17
    RECALL = 18
    RECALLED = 19
    EVICT = 20
    MARK = 21
    """MASK without parking: of several sequences, so that one graph is waited for and not one for each."""


class Reply(NamedTuple):
    """What an agent answers."""

    status: int
    items: int
    n_bytes: int
    cells: int
    masked: int
    written: int
    seconds: float
    done: bool
    payload: bytes
    problem: str


class SequenceInfo(NamedTuple):
    """One sequence, in cells and positions."""

    id: int
    low: int
    high: int
    cells: int
    masked: int
    affected: int
    parked: int
    lost: int
    used_s: float


class BlobInfo(NamedTuple):
    """One saved state that the program keeps."""

    id: int
    parked: bool
    checkpoint: bool
    n_bytes: int
    used_s: float


class BufferInfo(NamedTuple):
    """One buffer of a cache, wherever it is; pages of a host's buffer are a RegionInfo as well."""

    number: int
    """Rises with each that is made."""
    name: str
    """What llama.cpp calls its kind of memory: `CPU`, `Vulkan0`, `CUDA0`."""
    is_host: bool
    by_cell: bool
    n_tensors: int
    rows: int
    n_bytes: int


class RegionInfo(NamedTuple):
    """One buffer of a cache, in plain memory."""

    id: int
    by_cell: bool
    maskable: bool
    in_file: bool
    computing: bool
    stale: bool
    frees_swap: bool
    """A MiB or more of cells nobody uses is in swap; looked at when resident pages are counted."""
    context: int
    rows: int
    cell_bytes: int
    row_bytes: int
    size: int
    resident: int
    masked: int
    affected: int
    used_s: float
    readable: int
    written: int
    why_not_maskable: str
    sequences: tuple[SequenceInfo, ...]


Transport = Callable[[bytes], bytes]
"""Carries a request to the agent and its reply back. Raises EngineError when the agent is gone."""


class InProcess:
    """The transport to the agent in this process."""

    def __init__(self, serve: Callable[..., int]) -> None:
        self._serve = serve
        self._lock = threading.Lock()
        self._buffer = ctypes.create_string_buffer(1 << 16)

    def __call__(self, request: bytes) -> bytes:
        with self._lock:
            while True:
                n = self._serve(request, len(request), self._buffer, len(self._buffer))
                if n > 0:
                    return ctypes.string_at(self._buffer, n)
                if n == 0:
                    raise EngineError("the agent and this package are of different versions")
                self._buffer = ctypes.create_string_buffer(-n)


class Client:
    """The agent's answers as tuples. Raises EngineError when it is gone."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def ask(
        self,
        op: Op,
        region: int = 0,
        sequence: int = -1,
        *,
        flags: int = 0,
        ranges: Sequence[tuple[int, int]] = (),
        max_bytes: int = 0,
        deadline_s: float = 0.0,
        content: bytes = b"",
    ) -> Reply:
        """One request. `ranges` are positions of `sequence`; a bound of 0 is none."""
        head = _REQUEST.pack(VERSION, op, region, sequence, flags, len(ranges), max_bytes, deadline_s)
        raw = self._transport(head + np.asarray(ranges, dtype="<i4").tobytes() + content)
        status, count, n_bytes, cells, masked, written, seconds, done, n_problem = _REPLY.unpack_from(raw)
        end = len(raw) - n_problem
        problem = raw[end:].decode(errors="replace")
        return Reply(
            status,
            count,
            n_bytes,
            cells,
            masked,
            written,
            seconds,
            bool(done),
            raw[_REPLY.size : end],
            problem,
        )

    def regions(self, *, count_resident: bool) -> list[RegionInfo]:
        """All buffers of caches in the agent's process."""
        reply = self.ask(Op.SNAPSHOT, flags=int(count_resident))
        regions, at = [], 0
        for _ in range(reply.items):
            region, at = _region(reply.payload, at)
            regions.append(region)
        return regions

    def blobs(self) -> list[BlobInfo]:
        """All saved states that are whole."""
        reply = self.ask(Op.BLOBS)
        told = _BLOB.iter_unpack(reply.payload)
        return [BlobInfo(n, bool(flags & 1), bool(flags & 2), size, used) for n, flags, size, used in told]

    def buffers(self) -> list[BufferInfo]:
        """All buffers of caches, also those of a device."""
        reply = self.ask(Op.BUFFERS)
        return [
            BufferInfo(
                n,
                name.split(b"\0")[0].decode(errors="replace"),
                bool(host),
                bool(cells),
                n_tensors,
                rows,
                size,
            )
            for n, n_tensors, cells, host, size, rows, name in _BUFFER.iter_unpack(reply.payload)
        ]

    def cells(self, region: int, sequence: int) -> npt.NDArray[np.int32]:
        """Position and flags of each cell of a sequence, in the order of positions, and then of those that
        were evicted: shape (cells, 2)."""
        reply = self.ask(Op.SEQUENCE, region, sequence)
        cells: npt.NDArray[np.int32] = np.frombuffer(reply.payload, dtype="<i4").reshape(-1, 2)
        return cells

    def evidence(self, kind: int, region: int, sequence: int, part: Range) -> npt.NDArray[np.float64]:
        """One value a position of `part`. Raises EngineError where the graphs were not as expected."""
        reply = self.ask(Op.EVIDENCE, region, sequence, flags=kind, ranges=[part])
        if reply.status > NO_SUCH:
            raise EngineError("this model's attention was not as expected, and none was sampled")
        if reply.items != part.cells:
            return np.full(part.cells, np.nan)
        return np.frombuffer(reply.payload, dtype="<f4").astype(np.float64)


def _region(payload: bytes, at: int) -> tuple[RegionInfo, int]:
    """The region that is told at offset `at`, and the offset after it."""
    (
        number, flags, context, rows, cell_bytes, row_bytes, size, resident, masked, affected,
        used_s, n_sequences, readable, written, why,
    ) = _REGION.unpack_from(payload, at)  # fmt: skip
    at += _REGION.size
    sequences = []
    for _ in range(n_sequences):
        sequences.append(SequenceInfo(*_SEQUENCE.unpack_from(payload, at)))
        at += _SEQUENCE.size
    region = RegionInfo(
        id=number,
        by_cell=bool(flags & 1),
        maskable=bool(flags & 2),
        in_file=bool(flags & 4),
        computing=bool(flags & 8),
        stale=bool(flags & 16),
        frees_swap=bool(flags & 32),
        context=context,
        rows=rows,
        cell_bytes=cell_bytes,
        row_bytes=row_bytes,
        size=size,
        resident=resident,
        masked=masked,
        affected=affected,
        used_s=used_s,
        readable=readable,
        written=written,
        why_not_maskable=why.split(b"\0")[0].decode(errors="replace"),
        sequences=tuple(sequences),
    )
    return region, at
