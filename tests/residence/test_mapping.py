"""Memory that is parked is not in memory, and reads as before; what fails changes nothing."""

import ctypes
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from residence_help import filled, now

from psi_kv_governor.kernel import memory
from psi_kv_governor.residence import Mapping
from waiting import until

PAGE = memory.PAGE_BYTES
MIB = 1 << 20


@pytest.fixture(params=["file", "memory"])
def mapping(request, place) -> Mapping:
    made = Mapping(8 * MIB, backing=request.param, place=place)
    assert made.backing == request.param, made.why_not_file
    yield made
    made.close()


def rss_bytes(mapping: Mapping) -> int:
    """Bytes that this process has mapped of it, read from the page table without the code under test."""
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        file.seek(mapping.address // PAGE * 8)
        entries = np.frombuffer(file.read(mapping.n_bytes // PAGE * 8), dtype=np.uint64)
    return int((entries >> np.uint64(63)).sum()) * PAGE


def is_open(inode: int) -> bool:
    """Whether this process has that file. How many it has changes with what others leave to be collected."""
    for one in Path("/proc/self/fd").iterdir():
        try:
            if one.stat().st_ino == inode:
                return True
        except OSError:  # the folder itself, which was open while it was listed
            continue
    return False


def test_a_new_mapping_is_zeros_and_takes_nothing(mapping):
    assert rss_bytes(mapping) == 0
    assert not now(mapping).any()
    assert mapping.n_bytes == 8 * MIB
    assert mapping.address % PAGE == 0


def test_parked_bytes_leave_memory_and_read_as_before(mapping):
    before = filled(mapping)
    done = mapping.park([(MIB, 7 * MIB)])
    assert (done.problem, done.finished, done.counted) == ("", True, "mincore")
    assert done.bytes_returned == 6 * MIB
    assert mapping.resident_bytes() == 2 * MIB
    # A page that the kernel is just moving is in no page table for that moment.
    until(lambda: rss_bytes(mapping) == 2 * MIB, "the page table says otherwise", 30)
    np.testing.assert_array_equal(now(mapping), before)
    assert mapping.resident_bytes() == 8 * MIB


@pytest.mark.parametrize("behind", [False, True], ids=["dirty", "written behind"])
def test_parts_go_from_between_parts_that_stay(mapping, behind):
    """Kernels since 6.16 keep what comes at once in large folios, and drop no part of one."""
    before = filled(mapping)
    if behind:
        mapping.write_behind([(0, 8 * MIB)])
    # Read, as attention does: of a page that is mapped nowhere and that the kernel is just moving mincore
    # says that it is not there.
    np.testing.assert_array_equal(now(mapping), before)
    done = mapping.park([(at, at + 16 * PAGE) for at in range(0, 8 * MIB, 32 * PAGE)])
    assert done.bytes_returned == 4 * MIB
    assert mapping.resident_bytes() == 4 * MIB
    np.testing.assert_array_equal(now(mapping), before)


def test_what_was_parked_can_be_written_and_parked_again(mapping):
    expected = filled(mapping)
    for step in range(4):
        mapping.park([(0, 8 * MIB)])
        spot = slice(step * MIB + 100, step * MIB + 100 + 5 * PAGE)
        now(mapping)[spot] = expected[spot] = step + 1
    done = mapping.park([(0, 8 * MIB)])
    assert mapping.resident_bytes() == 0
    assert done.written_bytes == 6 * PAGE  # five pages' worth, not on a page's edge
    np.testing.assert_array_equal(now(mapping), expected)


def test_parts_are_rounded_inward_to_whole_pages(mapping):
    filled(mapping)
    assert mapping.park([(PAGE - 1, 3 * PAGE + 5)]).bytes_returned == 2 * PAGE
    assert mapping.park([(9 * PAGE + 1, 10 * PAGE + 5), (-5, 3), (8 * MIB - 5, 9 * MIB)]).bytes_returned == 0
    assert mapping.resident_bytes() == 8 * MIB - 2 * PAGE


def test_unparking_goes_in_slices_and_comes_back_clean(mapping):
    before = filled(mapping)
    mapping.park([(0, 8 * MIB)])
    first = mapping.unpark([(0, 8 * MIB)], max_bytes=3 * MIB + PAGE + 7)
    assert (first.bytes_back, first.finished, first.problem) == (3 * MIB + PAGE, False, "")
    assert mapping.resident_bytes() == 3 * MIB + PAGE
    assert mapping.unpark([(0, 8 * MIB)], deadline_s=-1).bytes_back == 0
    rest = mapping.unpark([(0, 8 * MIB)])
    assert (rest.bytes_back, rest.finished) == (5 * MIB - PAGE, True)
    assert mapping.dirty_bytes() == 0
    again = mapping.park([(0, 8 * MIB)])
    assert (again.bytes_returned, again.written_bytes) == (8 * MIB, 0)
    np.testing.assert_array_equal(now(mapping), before)


def test_what_was_written_behind_is_given_up_without_writing(mapping):
    before = filled(mapping)
    done = mapping.write_behind([(0, 8 * MIB)])
    assert done.bytes_returned == 0
    if mapping.backing == "memory":
        assert done.written_bytes == 8 * MIB
    else:  # the kernel writes a file by itself too, when others have dirtied much
        assert done.written_bytes <= 8 * MIB
        until(lambda: not mapping.dirty_bytes(), "it was not written")
    np.testing.assert_array_equal(now(mapping), before)
    assert mapping.resident_bytes() == 8 * MIB
    done = mapping.park([(0, 8 * MIB)])
    assert done.bytes_returned == 8 * MIB
    if mapping.backing == "memory":  # of a file the kernel may still be writing what was begun
        assert done.written_bytes == 0
    np.testing.assert_array_equal(now(mapping), before)


def test_released_parts_take_neither_memory_nor_change_their_neighbours(mapping):
    before = filled(mapping)
    mapping.park([(2 * MIB, 4 * MIB)])
    done = mapping.release([(MIB, 3 * MIB)])
    assert (done.bytes_returned, done.problem) == (MIB, "")
    before[MIB : 3 * MIB] = 0
    np.testing.assert_array_equal(now(mapping), before)
    now(mapping)[2 * MIB : 2 * MIB + 9] = before[2 * MIB : 2 * MIB + 9] = 7
    mapping.park([(0, 8 * MIB)])
    assert mapping.resident_bytes() == 0
    np.testing.assert_array_equal(now(mapping), before)


def test_released_space_goes_back_to_the_disk_unless_it_is_reserved(mapping):
    filled(mapping)
    mapping.park([(0, 8 * MIB)])
    assert mapping.stored_bytes == 8 * MIB
    mapping.release([(0, 4 * MIB)])
    assert mapping.stored_bytes == (8 if mapping.backing == "file" else 4) * MIB


def test_pages_never_touched_are_not_written(place):
    mapping = Mapping(8 * MIB, place=place)
    now(mapping)[3 * PAGE] = 1
    assert mapping.park([(0, 8 * MIB)]).written_bytes == PAGE
    assert mapping.stored_bytes == PAGE
    mapping.close()


def test_a_deadline_that_is_up_parks_nothing(mapping):
    filled(mapping)
    done = mapping.park([(0, 8 * MIB)], deadline_s=-1)
    assert (done.finished, done.bytes_returned, done.problem) == (False, 0, "")


def test_without_a_place_nothing_is_parked_and_the_reason_comes_back():
    mapping = Mapping(MIB, backing="file")
    filled(mapping)
    assert mapping.backing == "memory"
    assert "no folder" in mapping.why_not_file
    assert "no folder" in mapping.park([(0, MIB)]).problem
    assert mapping.release([(0, MIB)]).bytes_returned == MIB
    mapping.close()


def test_what_still_looks_at_a_closed_mapping_sees_zeros(mapping):
    view = now(mapping)
    filled(mapping)
    mapping.park([(0, MIB)])
    mapping.close()
    mapping.close()
    assert not view.any()
    assert mapping.park([(0, MIB)]).problem == "it is closed"


def test_memory_goes_when_the_last_view_of_it_goes(place):
    mapping = Mapping(8 * MIB, backing="file", place=place)
    address, inode = mapping.address, os.fstat(mapping._files[0].descriptor).st_ino
    assert is_open(inode)
    view = now(mapping)
    view[0] = 9
    del mapping
    assert not is_open(inode)
    assert view[0] == 9
    del view
    assert f"{address:x}-" not in Path("/proc/self/maps").read_text()


def test_it_is_a_buffer_for_ctypes_numpy_and_memoryview(mapping):
    memoryview(mapping.buffer).cast("B")[5] = 17
    assert ctypes.c_ubyte.from_address(mapping.address + 5).value == 17
    assert np.frombuffer(mapping.buffer, dtype=np.float16).nbytes == mapping.n_bytes


@pytest.mark.parametrize("allowed", [("pagemap",), ()])
def test_where_mincore_is_forbidden_the_count_says_where_it_comes_from(mapping, monkeypatch, allowed):
    monkeypatch.setattr(memory, "in_memory", lambda address, n_bytes: None)
    if "pagemap" not in allowed:
        monkeypatch.setattr(memory, "page_table", lambda address, n_bytes: None)
    before = filled(mapping)
    for _ in range(2):
        done = mapping.park([(0, 4 * MIB)])
        assert done.problem == ""
        assert done.counted == ("pagemap" if allowed else "computed")
        assert done.bytes_returned == 4 * MIB
        np.testing.assert_array_equal(now(mapping), before)
    assert mapping.unpark([(0, 8 * MIB)]).finished
    np.testing.assert_array_equal(now(mapping), before)


def test_a_reader_never_sees_anything_else_meanwhile(mapping):
    before = filled(mapping)
    stop, wrong = threading.Event(), []

    def read():
        rng = np.random.default_rng(0)
        while not stop.is_set():
            at = int(rng.integers(0, 8 * MIB - 64))
            if not np.array_equal(now(mapping)[at : at + 64], before[at : at + 64]):
                wrong.append(at)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        mapping.park([(MIB, 6 * MIB)])
        mapping.unpark([(0, 8 * MIB)], max_bytes=2 * MIB)
    stop.set()
    reader.join()
    assert wrong == []
