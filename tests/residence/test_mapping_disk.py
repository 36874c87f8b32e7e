"""A mapping on a disk that is full, too small, limited, broken or particular: nothing is lost."""

from pathlib import Path

import numpy as np
import pytest
from residence_help import ext4_image, filled, now, probes_end

from psi_kv_governor.kernel import memory
from psi_kv_governor.residence import Mapping, Place, check_place

PAGE = memory.PAGE_BYTES
MIB = 1 << 20


@pytest.fixture
def small_disk(mounted, tmp_path):
    with mounted("ext4", "-o", "loop", source=ext4_image(tmp_path, 16 * MIB)) as point:
        check_place(str(point), "the test", reserve_bytes=0)
        probes_end()
        found = check_place(str(point), "the test", reserve_bytes=0)  # with nothing of ours on it
        assert isinstance(found, Place), found
        yield found


def test_a_disk_that_is_too_small_is_told_before_a_cache_is_born_on_it(small_disk):
    mapping = Mapping(64 * MIB, backing="file", place=small_disk)
    assert mapping.backing == "memory"
    assert "space" in mapping.why_not_file
    mapping.close()


def test_a_disk_that_fills_up_changes_nothing_and_the_reason_comes_back(small_disk):
    mapping = Mapping(64 * MIB, place=small_disk)
    before = filled(mapping)
    done = mapping.park([(0, 64 * MIB)])
    assert "can't be parked" in done.problem
    assert not done.finished
    assert 4 * MIB < done.bytes_returned < 16 * MIB  # what was done before stays done
    np.testing.assert_array_equal(now(mapping), before)
    assert mapping.park([(60 * MIB, 64 * MIB)]).bytes_returned == 0
    mapping.release([(0, 8 * MIB)])
    assert mapping.park([(60 * MIB, 64 * MIB)]).bytes_returned == 4 * MIB
    np.testing.assert_array_equal(now(mapping)[8 * MIB :], before[8 * MIB :])
    del before
    mapping.close()


def test_a_full_disk_never_ends_a_cache_that_was_born_on_it(small_disk):
    mapping = Mapping(4 * MIB, backing="file", place=small_disk)
    assert mapping.backing == "file", mapping.why_not_file
    filler = Path(small_disk.folder) / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(65536)):
                pass
        except OSError:
            pass
    before = filled(mapping)
    mapping.park([(0, 4 * MIB)])
    mapping.release([(0, 2 * MIB)])
    before[: 2 * MIB] = 5
    now(mapping)[: 2 * MIB] = 5  # a SIGBUS, had its space gone
    mapping.park([(0, 4 * MIB)])
    np.testing.assert_array_equal(now(mapping), before)
    mapping.close()


def test_the_reserve_of_a_place_is_left_to_others(small_disk):
    free = small_disk.free_bytes
    careful = check_place(str(Path(small_disk.folder).parent), "the test", reserve_bytes=free - 2 * MIB)
    assert isinstance(careful, Place)
    mapping = Mapping(8 * MIB, place=careful)
    filled(mapping)
    done = mapping.park([(0, 8 * MIB)])
    assert "reserve" in done.problem
    assert done.bytes_returned == 2 * MIB
    mapping.close()


def test_the_limit_of_a_place_holds_for_all_mappings_together(disk):
    place = check_place(f"{disk}/limited", "the test", limit_bytes=3 * MIB, reserve_bytes=0)
    assert isinstance(place, Place)
    first, second = Mapping(2 * MIB, backing="file", place=place), Mapping(2 * MIB, place=place)
    filled(second)
    assert second.park([(0, 2 * MIB)]).bytes_returned == MIB
    first.close()
    assert second.park([(0, 2 * MIB)]).bytes_returned == MIB
    second.close()


def test_after_an_error_of_the_disk_nothing_is_dropped_any_more(place, monkeypatch):
    mapping = Mapping(4 * MIB, backing="file", place=place)
    before = filled(mapping)

    def fails(*_arguments, **_options):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(memory, "write_back", fails)
        assert "Input/output error" in mapping.park([(0, 4 * MIB)]).problem
    assert "its disk failed" in mapping.park([(0, 4 * MIB)]).problem
    assert mapping.resident_bytes() == 4 * MIB
    np.testing.assert_array_equal(now(mapping), before)
    mapping.close()


def test_a_filter_of_system_calls_is_tried_out_by_another_process(tmp_path):
    status = tmp_path / "status"
    status.write_text("Name:\tx\nSeccomp:\t2\n")
    assert memory.call_allowed("mincore", status)
    status.write_text("Name:\tx\nSeccomp:\t0\n")
    assert memory.call_allowed("mincore", tmp_path / "status")


def test_a_process_never_gets_more_mappings_than_the_kernel_bears(place, monkeypatch):
    """Every second page: the worst case."""
    from psi_kv_governor.residence import mapping as module

    monkeypatch.setattr(module, "MOST_PIECES", 1000)
    made = Mapping(16 * MIB, place=place)
    before = filled(made)
    scattered = [(page * PAGE, (page + 1) * PAGE) for page in range(0, 4096, 2)]
    assert made.park(scattered[:600]).problem == ""
    assert made.pieces > 1000
    assert "too many pieces" in made.park(scattered[600:]).problem
    np.testing.assert_array_equal(now(made), before)
    made.close()


def test_where_writing_past_the_cache_is_refused_it_goes_through_it(place, monkeypatch):
    import fcntl
    import os

    real = os.pwrite

    def refuses(descriptor, data, offset):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", refuses)
    made = Mapping(4 * MIB, place=place)
    before = filled(made)
    done = made.park([(0, 4 * MIB)])
    assert (done.problem, done.bytes_returned) == ("", 4 * MIB)
    np.testing.assert_array_equal(now(made), before)
    made.close()
