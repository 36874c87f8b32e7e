"""A worker's hands, on real memory: slices beside the engine, which takes blocks back at any moment."""

import ctypes
import random
import threading
from pathlib import Path

import numpy as np
import pytest

from psi_kv_governor.engines.vllm.layout import Layout, Run
from psi_kv_governor.engines.vllm.messages import Kind, Order
from psi_kv_governor.engines.vllm.parker import Parker
from psi_kv_governor.kernel.memory import PAGE_BYTES
from psi_kv_governor.residence import Mapping, find_place
from waiting import until

BLOCKS, PAGES, LAYERS = 64, 4, 3
SIZE = PAGES * PAGE_BYTES


@pytest.fixture(params=["file", "memory"])
def mapping(request):
    place = find_place(reserve_bytes=0).place
    assert place is not None
    made = Mapping(BLOCKS * SIZE * LAYERS, backing=request.param, place=place)
    assert made.backing == request.param, made.why_not_file
    yield made
    made.close()


@pytest.fixture
def parker(mapping):
    runs = [Run(0, layer * BLOCKS * SIZE, SIZE, SIZE) for layer in range(LAYERS)]
    made = Parker([mapping], Layout(runs, BLOCKS))
    yield made
    made.close()


def rows(mapping) -> np.ndarray:
    flat = np.ctypeslib.as_array(
        ctypes.cast(mapping.address, ctypes.POINTER(ctypes.c_uint8)), (mapping.n_bytes,)
    )
    return flat.reshape(LAYERS, BLOCKS, SIZE)


def fill(mapping) -> None:
    for block in range(BLOCKS):
        rows(mapping)[:, block] = block + 1


def test_parked_blocks_leave_memory_and_read_as_before(mapping, parker):
    fill(mapping)
    parker.order([Order(1, Kind.PARK, (3, 4, 9))])
    parker.work(1e12)
    assert parker.finished()[1].bytes_returned == 3 * SIZE * LAYERS
    assert not parker.busy
    for block in (3, 4, 9, 10):
        assert (rows(mapping)[:, block] == block + 1).all()


def test_released_blocks_leave_memory_and_their_neighbours_stay(mapping, parker):
    fill(mapping)
    parker.order([Order(1, Kind.RELEASE, (5,))])
    parker.work(1e12)
    assert parker.finished()[1].bytes_returned == SIZE * LAYERS
    assert (rows(mapping)[:, 5] == 0).all()
    assert (rows(mapping)[:, 4] == 5).all()
    assert (rows(mapping)[:, 6] == 7).all()


def test_blocks_come_back_before_they_are_read(mapping, parker):
    fill(mapping)
    parker.order([Order(1, Kind.PARK, (7,)), Order(2, Kind.BACK, (7,))])
    parker.work(1e12)
    assert parker.finished()[2].bytes_back == SIZE * LAYERS


def test_a_block_that_is_claimed_is_left_alone(mapping, parker):
    """Also a released one: whoever uses it from now on finds what he writes."""
    fill(mapping)
    parker.order([Order(1, Kind.RELEASE, (1, 2, 3))])
    parker.claim([2])
    parker.work(1e12)
    assert parker.finished()[1].bytes_returned == 2 * SIZE * LAYERS
    assert (rows(mapping)[:, 2] == 3).all()


def test_an_order_of_which_all_is_claimed_is_finished_too(parker):
    parker.order([Order(1, Kind.PARK, (1, 2))])
    parker.claim([1, 2])
    parker.work(1e12)
    assert parker.finished()[1].bytes_returned == 0


def test_it_stops_at_its_time_and_goes_on_later(mapping, parker, monkeypatch):
    monkeypatch.setattr("psi_kv_governor.engines.vllm.parker.SLICE_BYTES", SIZE * LAYERS)
    fill(mapping)
    parker.order([Order(1, Kind.PARK, tuple(range(10)))])
    parker.work(0.0)
    assert parker.busy
    parker.work(1e12)
    assert parker.finished()[1].bytes_returned == 10 * SIZE * LAYERS


def test_the_thread_works_by_itself(mapping, parker):
    fill(mapping)
    parker.start()
    parker.order([Order(1, Kind.PARK, (1,))])
    found = {}
    until(lambda: found.update(parker.finished()) or 1 in found)
    assert found[1].bytes_returned == SIZE * LAYERS


def test_whoever_claims_first_always_finds_what_he_wrote(mapping, parker, monkeypatch):
    """The engine uses and frees blocks at random while they are parked and released behind its back."""
    monkeypatch.setattr("psi_kv_governor.engines.vllm.parker.SLICE_BYTES", 2 * SIZE * LAYERS)
    parker.start()
    chance, written = random.Random(3), {}
    memory = rows(mapping)
    for number in range(300):
        used = chance.sample(range(BLOCKS), 8)
        parker.claim(used)
        for block in used:
            assert (memory[:, block, ::512] == written.get(block, 0)).all(), f"block {block} at {number}"
            written[block] = chance.randrange(1, 255)
            memory[:, block] = written[block]
        idle = [block for block in range(BLOCKS) if block not in used]
        parked = chance.sample(idle, 10)
        parker.order([Order(number, Kind.PARK, tuple(parked))])
    until(lambda: not parker.busy)
    assert threading.active_count() < 50


def test_what_is_written_anew_is_not_read_for_that(mapping, parker):
    """A write to a parked page brings its old content from the disk first."""
    fill(mapping)
    parker.order([Order(1, Kind.PARK, tuple(range(BLOCKS)))])
    parker.work(1e12)
    anew = []
    for block in (3, 20, 60):  # the least counts: code that the kernel took meanwhile is read as well
        parker.claim([block])
        before = read_bytes()
        parker.blank([block])
        rows(mapping)[:, block] = 99
        anew.append(read_bytes() - before)
    parker.claim([40])
    before = read_bytes()
    rows(mapping)[:, 40] = 98
    assert min(anew) < SIZE * LAYERS <= read_bytes() - before
    assert (rows(mapping)[:, 3] == 99).all()
    assert (rows(mapping)[:, 4] == 5).all()


def read_bytes() -> int:
    """What this process has had read from disks."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))
