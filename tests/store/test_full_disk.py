"""A disk that is full, fills up, or takes nothing: said in one line, and nothing half written stays."""

import contextlib
import resource
import shutil
from pathlib import Path

import pytest
from store_help import get, in_child, open_store_as, put

from psi_kv_governor.errors import BadInputError, StoreFullError
from psi_kv_governor.store.disk import DiskStore

MIB = 1 << 20


@pytest.mark.parametrize("mode", ["O_DIRECT", "buffered"])
def test_a_file_size_limit_in_mid_write_keeps_nothing(folder, tag, mode):
    store = open_store_as(folder, mode)
    kept = put(store, tag, b"k" * 5000)

    def body():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * MIB, 3 * MIB))
        used = store.used_bytes
        try:
            put(store, tag, bytes(5 * MIB))
        except StoreFullError as error:
            assert store.used_bytes == used
            assert get(store, tag, kept, 5000) == b"k" * 5000
            return str(error)
        return "it was kept"

    assert in_child(body) == f"cannot write to {folder}: File too large"
    store.close()


@pytest.mark.parametrize("mode", ["O_DIRECT", "buffered"])
def test_a_disk_that_fills_up_keeps_nothing_half_written(tiny_disk, tag, mode):
    with tiny_disk() as point:
        store = open_store_as(point, mode)
        kept = put(store, tag, b"k" * 5000)
        filler = point / "filler"

        def chunks():
            yield memoryview(bytes(MIB))
            fill_up(filler)
            yield memoryview(bytes(3 * MIB))

        if mode == "buffered":
            with pytest.raises(StoreFullError, match="No space left"):
                store.put(tag, 4 * MIB, chunks())
            assert store.used_bytes == 8192
        else:  # its space was taken beforehand, so a neighbour cannot take it any more
            key = store.put(tag, 4 * MIB, chunks())
            assert get(store, tag, key, 4 * MIB) == bytes(4 * MIB)
            store.drop(key)
        assert get(store, tag, kept, 5000) == b"k" * 5000
        filler.unlink()
        assert get(store, tag, put(store, tag, b"n" * MIB), MIB) == b"n" * MIB
        store.close()


def fill_up(filler: Path) -> None:
    """Write until the disk has not one block left."""
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1024))  # the block of so small an ext4
    assert shutil.disk_usage(filler.parent).free == 0


def test_a_full_disk_is_seen_before_anything_is_written(tiny_disk, tag):
    with tiny_disk() as point:
        store = DiskStore(point, 1 << 30, 0)
        with pytest.raises(StoreFullError, match="reserve"):
            store.put(tag, 100 * MIB, iter(lambda: pytest.fail("a chunk was asked for"), None))
        store.close()


def test_a_disk_without_a_free_byte_can_still_be_opened(tiny_disk, tag):
    with tiny_disk() as point:
        fill_up(point / "filler")
        store = DiskStore(point, 1 << 30, 0)
        assert store.room_bytes() == 0
        (point / "filler").unlink()
        assert get(store, tag, put(store, tag, b"n" * 9), 9) == b"n" * 9
        store.close()


def test_a_read_only_disk_is_refused_with_one_line(tiny_disk):
    with tiny_disk(read_only=True) as point:
        with pytest.raises(BadInputError, match="Read-only file system") as caught:
            DiskStore(point, MIB, 0)
        assert "\n" not in str(caught.value)
