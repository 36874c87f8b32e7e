"""Steps that the store's tests repeat."""

import os
from pathlib import Path

import pytest

from psi_kv_governor.store.base import BlobTag
from psi_kv_governor.store.disk import DiskStore


def open_store_as(folder: Path, mode: str, **limits: int) -> DiskStore:
    made = DiskStore(folder, **{"limit_bytes": 64 << 20, "reserve_bytes": 0, **limits})
    if mode == "buffered":
        made._direct = False
    elif not made.direct:
        pytest.skip(f"the filesystem of {folder} has no O_DIRECT")
    return made


def put(store: DiskStore, tag: BlobTag, data: bytes) -> int:
    return store.put(tag, len(data), [memoryview(data)])


def get(store: DiskStore, tag: BlobTag, key: int, n_bytes: int) -> bytes:
    into = bytearray(n_bytes)
    store.get(key, tag, [memoryview(into)])
    return bytes(into)


def in_child(body) -> str:
    """Run `body` in a forked child, where limits and privileges can be given up; gives what it returns."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = body()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answers:
        text = answers.read()
    os.waitpid(child, 0)
    return text
