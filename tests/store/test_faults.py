"""Full disks, changed files, lost folders, killed processes: nothing wrong is loaded, nothing stays."""

import ctypes
import mmap
import os
import resource
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from store_help import get, in_child, put

from psi_kv_governor.errors import BadInputError, BlobCorruptError, StoreError, StoreFullError
from psi_kv_governor.store import disk as disk_module
from psi_kv_governor.store.disk import DiskStore

MIB = 1 << 20


def file_of(store, key: int) -> Path:
    """The blob's file, as root or another process of the same user would reach it."""
    return Path(f"/proc/self/fd/{store._blobs[key].descriptor}")


@pytest.mark.parametrize("offset", [0, 9, 30, 60, 5000, 2 * MIB + 17, 3 * MIB + 55, -1])
def test_one_changed_byte_anywhere_is_found(store, tag, offset):
    data = os.urandom(3 * MIB)
    key = put(store, tag, data)
    with file_of(store, key).open("r+b", buffering=0) as file:
        file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        old = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([old[0] ^ 1]))
    with pytest.raises(BlobCorruptError):
        get(store, tag, key, len(data))
    other = put(store, tag, data)
    assert get(store, tag, other, len(data)) == data


@pytest.mark.parametrize("length", [0, 40, 4096, 2 * MIB])
def test_a_file_cut_short_is_found(store, tag, length):
    key = put(store, tag, bytes(3 * MIB))
    os.truncate(file_of(store, key), length)
    with pytest.raises(BlobCorruptError, match="shorter"):
        get(store, tag, key, 3 * MIB)


def test_the_file_of_another_blob_is_found(store, tag):
    first, second = put(store, tag, b"a" * 5000), put(store, tag, b"b" * 5000)
    file_of(store, first).write_bytes(file_of(store, second).read_bytes())
    with pytest.raises(BlobCorruptError, match="not the file"):
        get(store, tag, first, 5000)
    assert get(store, tag, second, 5000) == b"b" * 5000


def test_a_blob_has_no_name_and_is_the_owners_alone(store, tag, folder):
    key = put(store, tag, b"secret" * 1000)
    assert list(folder.iterdir()) == []
    status = file_of(store, key).stat()
    assert status.st_nlink == 0
    assert status.st_mode & 0o777 == 0o600


def test_without_nameless_files_names_live_for_no_byte(monkeypatch, folder, tag):
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)  # what an old kernel makes of the flag: EISDIR
    store = DiskStore(folder, MIB, 0)
    key = put(store, tag, b"secret" * 1000)
    assert list(folder.iterdir()) == []
    assert file_of(store, key).stat().st_nlink == 0
    assert file_of(store, key).stat().st_mode & 0o777 == 0o600
    assert get(store, tag, key, 6000) == b"secret" * 1000
    store.close()


def resident_bytes(path: Path) -> int:
    """Bytes of a file that are in the page cache: mincore(2)."""
    size = path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as view:
        pages = (ctypes.c_ubyte * (size // mmap.PAGESIZE))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages) == 0
        return sum(page & 1 for page in pages) * mmap.PAGESIZE


def test_neither_writing_nor_reading_fills_the_page_cache(store, tag):
    data = os.urandom(8 * MIB)
    key = put(store, tag, data)
    assert resident_bytes(file_of(store, key)) == 0
    assert get(store, tag, key, len(data)) == data
    assert resident_bytes(file_of(store, key)) == 0


def test_the_measure_of_the_page_cache_sees_a_plain_write(store, tag):
    key = put(store, tag, bytes(MIB))
    with file_of(store, key).open("r+b") as file:
        file.write(bytes(MIB))
    assert resident_bytes(file_of(store, key)) >= MIB


def test_writing_allocates_next_to_nothing(store, tag):
    row = memoryview(os.urandom(100_001))
    put(store, tag, bytes(1000))  # what is made once is made now
    tracemalloc.start()
    store.put(tag, 80 * len(row), (row for _ in range(80)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 << 10


def test_a_folder_that_may_not_be_written_is_refused_with_one_line(folder):
    closed = folder / "closed"
    closed.mkdir(mode=0o555)

    def body():
        if os.geteuid() == 0:
            folder.chmod(0o755)
            os.setuid(65534)
        try:
            DiskStore(closed, MIB, 0)
        except BadInputError as error:
            return str(error)
        return "it was opened"

    expected = f"cannot spill to {closed}: Permission denied; point store_dir at a writable folder"
    assert in_child(body) == expected


def test_a_file_in_place_of_the_folder_is_refused(folder):
    (folder / "file").write_text("")
    with pytest.raises(BadInputError, match="cannot spill"):
        DiskStore(folder / "file", MIB, 0)


def test_a_folder_that_vanished_stops_writing_and_not_reading(store, tag, folder):
    key = put(store, tag, b"x" * 5000)
    folder.rmdir()
    with pytest.raises(StoreError, match="cannot be used any more"):
        put(store, tag, b"y")
    assert store.room_bytes() == 0
    assert get(store, tag, key, 5000) == b"x" * 5000
    assert not folder.exists()


def test_half_of_the_open_files_stay_with_the_program(store, tag):
    def body():
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        for _ in range(32):
            put(store, tag, b"x")
        assert store.room_bytes() == 0
        try:
            put(store, tag, b"x")
        except StoreFullError as error:
            return str(error)
        return "it was kept"

    assert in_child(body).startswith("32 blobs are kept")


def test_a_store_that_is_forgotten_keeps_no_disk(folder, tag):
    store = DiskStore(folder, MIB, 0)
    descriptor = store._blobs[put(store, tag, b"x" * 5000)].descriptor
    os.fstat(descriptor)
    del store
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


CHILD = """
import sys, time
from pathlib import Path
from psi_kv_governor.store import BlobTag, DiskStore
store = DiskStore(Path(sys.argv[1]), 64 << 20, 0)
tag = BlobTag(model="m", library="l", layout="x", start=0, stop=1)
key = store.put(tag, 4 << 20, [memoryview(bytes(4 << 20))])
print("written", flush=True)
sys.stdin.readline()
back = bytearray(4 << 20)
store.get(key, tag, [memoryview(back)])
print("whole" if back == bytes(4 << 20) else "torn", flush=True)
"""


@pytest.fixture
def other_process(folder):
    """Another process with a store in the same folder and one blob of 4 MiB in it."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(disk_module.__file__).parents[2])},
    ) as process:
        assert process.stdout.readline() == "written\n"
        yield process
        process.kill()


def test_nothing_stays_after_a_kill(other_process, folder):
    held = [str(link.readlink()) for link in Path(f"/proc/{other_process.pid}/fd").iterdir()]
    assert any(link.startswith(str(folder)) for link in held)
    other_process.send_signal(signal.SIGKILL)
    other_process.wait()
    assert list(folder.iterdir()) == []


def test_two_processes_share_a_folder(other_process, store, tag):
    key = put(store, tag, b"x" * MIB)
    store.drop(put(store, tag, b"y" * MIB))
    other_process.stdin.write("\n")
    other_process.stdin.flush()
    assert other_process.stdout.readline() == "whole\n"
    assert get(store, tag, key, MIB) == b"x" * MIB
