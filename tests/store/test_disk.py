"""The disk store gives back exactly what was put, or says that it can't."""

import contextlib
import itertools
import os
import resource
import stat
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_help import get, put

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.errors import BadInputError, BlobCorruptError, StoreError, StoreFullError
from psi_kv_governor.store import disk as disk_module
from psi_kv_governor.store import open_store
from psi_kv_governor.store.disk import DiskStore

BLOCK = 4096
SMALL_BOUNCE = 2 * BLOCK


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    ends = list(itertools.accumulate(sizes))
    return [data[end - size : end] for end, size in zip(ends, sizes, strict=True)]


# Sizes around a block, around the buffer, nothing at all, and odd ones in between.
pieces = st.lists(
    st.one_of(
        st.sampled_from(
            [0, 1, 511, 512, BLOCK - 56, BLOCK - 1, BLOCK, BLOCK + 1, SMALL_BOUNCE, SMALL_BOUNCE + 1]
        ),
        st.integers(0, 3 * SMALL_BOUNCE),
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(written=pieces, seed=st.integers(0, 255), data=st.data())
def test_what_was_put_comes_back_however_it_is_cut(folder, tag, written, seed, data):
    total = sum(written)
    content = bytes((seed + i * 7) % 251 for i in range(total))
    marks = sorted(data.draw(st.lists(st.integers(0, total), max_size=6), label="cuts on reading"))
    read = [b - a for a, b in itertools.pairwise([0, *marks, total])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_module, "BOUNCE_BYTES", SMALL_BOUNCE)
        for direct in (True, False):
            store = DiskStore(folder, 1 << 20, 0)
            store._direct = store._direct and direct
            key = store.put(tag, total, (memoryview(piece) for piece in cut(content, written)))
            buffers = [bytearray(size) for size in read]
            store.get(key, tag, (memoryview(buffer) for buffer in buffers))
            assert b"".join(buffers) == content
            assert store.used_bytes % BLOCK == 0
            assert 0 <= store.used_bytes - total < 2 * BLOCK
            store.drop(key)
            assert store.used_bytes == 0
            store.close()


def test_a_chunk_whose_memory_is_used_again_is_kept_as_it_was(store, tag):
    scratch = bytearray(1000)

    def chunks():
        for value in range(5):
            scratch[:] = bytes([value]) * 1000
            yield memoryview(scratch)

    key = store.put(tag, 5000, chunks())
    assert get(store, tag, key, 5000) == b"".join(bytes([value]) * 1000 for value in range(5))


def test_rows_of_numbers_are_taken_as_bytes(store, tag):
    rows = np.arange(3000, dtype=np.float32).reshape(30, 100)
    key = store.put(tag, rows.nbytes, [memoryview(rows)])
    back = np.zeros_like(rows)
    store.get(key, tag, [memoryview(back)])
    assert (back == rows).all()


def test_blobs_do_not_disturb_each_other(store, tag):
    keys = {put(store, tag, bytes([i]) * (i * 3001)): i for i in range(1, 6)}
    store.drop(next(iter(keys)))
    for key, i in list(keys.items())[1:]:
        assert get(store, tag, key, i * 3001) == bytes([i]) * (i * 3001)


def test_a_blob_stays_until_it_is_dropped(store, tag):
    key = put(store, tag, b"x" * 10_000)
    assert get(store, tag, key, 10_000) == get(store, tag, key, 10_000)
    store.drop(key)
    store.drop(key)
    with pytest.raises(StoreError, match="no blob"):
        get(store, tag, key, 10_000)


@pytest.mark.parametrize(
    "change", [{"model": "other"}, {"library": "2"}, {"layout": "q8_0"}, {"start": 0}, {"stop": 1}]
)
def test_a_blob_of_something_else_is_never_loaded(store, tag, change):
    key = put(store, tag, b"x" * 10_000)
    into = bytearray(10_000)
    with pytest.raises(BlobCorruptError, match="is of"):
        store.get(key, msgspec.structs.replace(tag, **change), [memoryview(into)])
    assert into == bytes(10_000)


@pytest.mark.parametrize("n_bytes", [0, 9_999, 10_001, 30_000])
def test_asking_for_another_length_is_refused(store, tag, n_bytes):
    key = put(store, tag, b"x" * 10_000)
    with pytest.raises(BlobCorruptError, match="10000 bytes"):
        get(store, tag, key, n_bytes)


@pytest.mark.parametrize("n_bytes", [0, 9_999, 10_001])
def test_chunks_of_another_length_than_announced_keep_nothing(store, tag, n_bytes):
    with pytest.raises(StoreError, match="announced"):
        store.put(tag, n_bytes, [memoryview(b"x" * 10_000)])
    assert store.used_bytes == 0
    assert open_blobs(store) == []


def test_a_failure_while_chunks_are_made_keeps_nothing(store, tag):
    def chunks():
        yield memoryview(b"x" * 5000)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.put(tag, 10_000, chunks())
    assert store.used_bytes == 0
    assert open_blobs(store) == []
    assert get(store, tag, put(store, tag, b"y" * 10), 10) == b"y" * 10


def test_a_second_use_in_the_middle_of_a_blob_is_refused(store, tag):
    first = put(store, tag, b"x" * 100)

    def chunks():
        get(store, tag, first, 100)
        yield memoryview(b"y" * 100)

    with pytest.raises(StoreError, match="in the middle"):
        store.put(tag, 100, chunks())
    assert get(store, tag, first, 100) == b"x" * 100


def test_a_closed_store_takes_and_gives_nothing(store, tag):
    key = put(store, tag, b"x" * 100)
    store.close()
    store.close()
    assert store.used_bytes == 0
    assert store.room_bytes() == 0
    assert open_blobs(store) == []
    with pytest.raises(StoreError, match="closed"):
        put(store, tag, b"x")
    with pytest.raises(StoreError, match="no blob"):
        get(store, tag, key, 100)


@given(limit=st.integers(0, 20 * BLOCK), before=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_room_is_exactly_what_fits(folder, tag, limit, before):
    store = DiskStore(folder, limit, 0)
    if 0 < before <= store.room_bytes():
        put(store, tag, bytes(before))
    room = store.room_bytes()
    with pytest.raises(StoreFullError, match="limit"):
        put(store, tag, bytes(room + 1))
    if room:
        put(store, tag, bytes(room))
    assert store.used_bytes <= limit
    store.close()


def test_the_reserve_of_the_disk_is_left_alone(folder, tag):
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    store = DiskStore(folder, 1 << 40, free + (1 << 30))
    assert store.room_bytes() == 0
    with pytest.raises(StoreFullError, match="reserve"):
        put(store, tag, b"x")
    store.close()


def test_the_speed_is_measured(store, tag):
    assert store.write_bytes_per_s is None
    put(store, tag, bytes(8 << 20))
    assert 1e5 < store.write_bytes_per_s < 1e12


def test_the_folder_is_made_private(folder, tag):
    store = DiskStore(folder / "a" / "spill", 1 << 20, 0)
    assert stat.S_IMODE((folder / "a" / "spill").stat().st_mode) == 0o700
    store.close()


def test_none_means_no_store():
    assert open_store(GovernorConfig(store="none")) is None


def test_the_configuration_says_where_and_how_much(folder):
    store = open_store(GovernorConfig(store_dir=str(folder), store_limit_bytes=BLOCK, store_reserve_bytes=0))
    assert isinstance(store, DiskStore)
    assert store.directory == folder
    assert 0 < store.room_bytes() < BLOCK
    store.close()


def test_a_default_folder_that_cannot_be_used_is_no_bad_input(monkeypatch, folder):
    (folder / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "file"))
    with pytest.raises(StoreError, match="cannot spill"):
        open_store(GovernorConfig())
    with pytest.raises(BadInputError, match="cannot spill"):
        open_store(GovernorConfig(store_dir=str(folder / "file")))


def open_blobs(store) -> list[str]:
    """Files without a name in the store's folder that this process holds open."""
    links = []
    for entry in list(Path("/proc/self/fd").iterdir()):
        try:
            link = str(entry.readlink())
        except OSError:  # the descriptor of the listing itself
            continue
        if link.startswith(str(store.directory)):
            links.append(link)
    return links


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_dropped_blob_is_freed_by_tidy_and_not_before(store, tag):
    before = open_files()
    keys = [store.put(tag, 4, [memoryview(b"abcd")]) for _ in range(3)]
    for key in keys:
        store.drop(key)
    assert store.used_bytes == 0
    assert open_files() == before + 3
    store.tidy()
    assert open_files() == before
    store.tidy()


def test_a_put_that_needs_the_room_of_dropped_blobs_frees_it(folder, tag):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (2 * (open_files() + 4), hard))
    try:
        with contextlib.closing(DiskStore(folder)) as store:
            for _ in range(3 * open_files()):
                store.drop(store.put(tag, 4, [memoryview(b"abcd")]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
