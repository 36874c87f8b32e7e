"""The simulated engine keeps the promises of the Engine protocol, on a counting store and on a real one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psi_kv_governor.engine.base import Engine
from psi_kv_governor.engine.simulated import CELL_BYTES, SimulatedEngine, SimulatedStore
from psi_kv_governor.errors import BlobCorruptError, EngineError
from psi_kv_governor.ledger import LIVE, LOST, SPILLED
from psi_kv_governor.policy.base import Range
from psi_kv_governor.store.base import Store
from psi_kv_governor.store.disk import DiskStore


def filled(cells: int = 1000, blob_cells: int = 64) -> SimulatedEngine:
    engine = SimulatedEngine(1024, blob_cells=blob_cells)
    engine.grow(cells)
    return engine


def test_it_is_an_engine_and_its_store_a_store():
    engine: Engine = SimulatedEngine(8)
    store: Store = SimulatedStore(8)
    assert engine.capabilities.spill.able
    assert not engine.capabilities.recompute.able
    assert store.room_bytes() == 8


def test_a_trim_returns_the_bytes_of_its_cells():
    engine, store = filled(), SimulatedStore(1 << 30)
    result = engine.trim([Range(64, 192), Range(256, 300)], store)
    assert (result.cells, result.spilled, result.problem) == (172, 172, "")
    assert result.bytes_returned == store.used_bytes == 172 * CELL_BYTES
    assert engine.resident_bytes == (1000 - 172) * CELL_BYTES
    assert list(engine.ledger.ranges(SPILLED)) == [Range(64, 192), Range(256, 300)]


def test_cells_already_away_are_not_given_up_twice():
    engine, store = filled(), SimulatedStore(1 << 30)
    engine.trim([Range(0, 100)], store)
    assert engine.trim([Range(50, 150), Range(140, 160)], store).cells == 60
    assert engine.ledger.count(SPILLED) == 160


def test_without_a_store_cells_are_lost():
    engine = filled()
    assert engine.trim([Range(0, 100)], None).spilled == 0
    assert (engine.ledger.count(LOST), engine.resident_bytes) == (100, 900 * CELL_BYTES)
    assert engine.restore(100, None).problem == "there is no store to restore from"


def test_a_full_store_leaves_the_rest_lost_and_says_so():
    engine, store = filled(), SimulatedStore(100 * CELL_BYTES)
    result = engine.trim([Range(0, 192)], store)
    assert (result.cells, result.spilled) == (192, 64)
    assert "has room for" in result.problem
    assert (engine.ledger.count(SPILLED), engine.ledger.count(LOST)) == (64, 128)


def test_the_last_given_up_comes_back_first_in_whole_blobs():
    engine, store = filled(), SimulatedStore(1 << 30)
    engine.trim([Range(64, 192)], store)
    engine.trim([Range(256, 320)], store)
    assert engine.restore(130, store).cells == 128
    assert list(engine.ledger.ranges(SPILLED)) == [Range(64, 128)]
    assert engine.restore(63, store).cells == 0
    assert engine.restore(64, store).missing == 0
    assert (store.used_bytes, engine.resident_bytes) == (0, 1000 * CELL_BYTES)


def test_a_broken_blob_is_lost_and_never_loaded():
    class Broken(SimulatedStore):
        def get(self, key, tag, buffers):
            if tag.start == 0:
                raise BlobCorruptError("blob 0 is not what was written")
            super().get(key, tag, buffers)

    engine, store = filled(), Broken(1 << 30)
    engine.trim([Range(0, 128)], store)
    result = engine.restore(1000, store)
    assert (result.cells, result.missing, result.problem) == (64, 64, "blob 0 is not what was written")
    assert list(engine.ledger.ranges(LOST)) == [Range(0, 64)]
    assert store.used_bytes == 0


def test_tokens_past_the_context_are_refused():
    engine = filled()
    with pytest.raises(EngineError, match="25 tokens more than 1000 do not fit in 1024 cells"):
        engine.grow(25)
    assert len(engine.ledger) == 1000


def test_truncation_frees_pages_only_at_the_release():
    engine, store = filled(), SimulatedStore(1 << 30)
    engine.trim([Range(0, 128)], store)
    engine.truncate(100, store)
    assert engine.resident_bytes == 872 * CELL_BYTES
    assert engine.release() == 872 * CELL_BYTES
    assert engine.release() == 0
    # The blob of 64 to 128 was cut: what it held of the sequence cannot be put back in part.
    assert (engine.ledger.count(SPILLED), engine.ledger.count(LOST)) == (64, 36)
    assert store.used_bytes == 64 * CELL_BYTES


def test_it_spills_to_the_disk_and_back(tmp_path: Path):
    store = DiskStore(tmp_path, reserve_bytes=0)
    engine = filled()
    assert engine.trim([Range(0, 128)], store).spilled == 128
    assert engine.restore(128, store).cells == 128
    store.close()


scripts = st.lists(
    st.one_of(
        st.tuples(st.just("grow"), st.integers(0, 60), st.just(0)),
        st.tuples(st.just("trim"), st.integers(0, 300), st.integers(0, 300)),
        st.tuples(st.just("restore"), st.integers(0, 200), st.just(0)),
        st.tuples(st.just("truncate"), st.integers(0, 300), st.just(0)),
        st.tuples(st.just("release"), st.just(0), st.just(0)),
    ),
    max_size=25,
)


@settings(max_examples=80, deadline=None)
@given(scripts, st.integers(1, 100), st.sampled_from([None, 50, 10_000]))
def test_bytes_and_places_agree_whatever_is_done(script, blob_cells, store_cells):
    engine = SimulatedEngine(300, cell_bytes=10, blob_cells=blob_cells)
    store = None if store_cells is None else SimulatedStore(store_cells * 10)
    for what, one, other in script:
        ledger, before = engine.ledger, engine.resident_bytes
        if what == "grow":
            engine.grow(min(one, 300 - len(ledger)))
        elif what == "trim":
            live = ledger.count(LIVE)
            result = engine.trim([Range(*sorted((one, other)))], store)
            assert result.cells == live - ledger.count(LIVE)
            assert result.bytes_returned == before - engine.resident_bytes
        elif what == "restore":
            missing = ledger.holes()
            result = engine.restore(one, store)
            assert result.cells == missing - ledger.holes() <= one
        elif what == "truncate":
            engine.truncate(one, store)
        else:
            assert engine.release() == before - engine.resident_bytes
        assert engine.resident_bytes >= ledger.count(LIVE) * 10
        assert (0 if store is None else store.used_bytes) == ledger.count(SPILLED) * 10
