"""Whatever fails, the model goes on: nothing wrong is loaded, and nothing lost that could be kept."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
from engine_help import (
    RECOMPUTED,
    anonymous_bytes,
    assert_map_is_true,
    evict,
    logits_after,
    places,
    plain_twin,
    rows_at,
    some_tokens,
    spill,
)
from models import LARGE, LLAMA

from psi_kv_governor.engine.llama import engine as engine_module
from psi_kv_governor.errors import BlobCorruptError, EngineError
from psi_kv_governor.events import Degraded
from psi_kv_governor.ledger import LIVE, LOST
from psi_kv_governor.policy.base import Range
from psi_kv_governor.store.disk import DiskStore

pytestmark = pytest.mark.llama
TOKENS = some_tokens(300)


def flip_a_byte(store: DiskStore, key: int, offset: int) -> None:
    """Change a blob's file on disk, as root may at any time."""
    descriptor = os.open(f"/proc/self/fd/{store._blobs[key].descriptor}", os.O_RDWR)
    try:
        byte = os.pread(descriptor, 1, offset)[0]
        os.pwrite(descriptor, bytes([byte ^ 0x40]), offset)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_blob_changed_on_disk_is_never_loaded_but_recomputed(open_llm, share):
    llm = open_llm()
    twin = plain_twin(llm)
    llm.eval(TOKENS), twin.eval(TOKENS)
    rows = {p: rows_at(llm, p) for p in range(300)}
    spill(llm, (20, 120), (150, 200))
    store = llm.governor._store
    first = min(store._blobs)
    flip_a_byte(store, first, int(share * store._blobs[first].n_bytes))
    events = []
    llm.governor.subscribe(events.append)
    result = llm.governor.restore()
    assert (result.cells, result.missing) == (50, 100)
    assert "blob" in result.problem
    assert [event.what for event in events if isinstance(event, Degraded)] == ["restore"]
    assert {p for p, place in places(llm).items() if place == LOST} == set(range(20, 120))
    assert all(rows_at(llm, p) == rows[p] for p, place in places(llm).items() if place == LIVE)
    assert llm.make_whole() == 0
    np.testing.assert_allclose(logits_after(llm, 5), logits_after(twin, 5), rtol=0, atol=RECOMPUTED)
    assert_map_is_true(llm)


def test_a_changed_blob_that_was_half_restored_leaves_that_half(open_llm):
    llm = open_llm()
    llm.eval(TOKENS)
    rows = [rows_at(llm, p) for p in range(300)]
    spill(llm, (20, 120))
    assert llm.governor.restore(40).cells == 40
    flip_a_byte(llm.governor._store, min(llm.governor._store._blobs), 5000)
    result = llm.governor.restore()
    assert (result.cells, result.missing) == (0, 60)
    assert [rows_at(llm, p) for p in range(20, 60)] == rows[20:60]
    assert_map_is_true(llm)


def test_a_changed_blob_at_the_end_of_the_sequence_does_not_stop_a_decode(open_llm):
    llm = open_llm(n_batch=32)
    twin = plain_twin(llm, n_batch=32)
    llm.eval(TOKENS), twin.eval(TOKENS)
    spill(llm, (20, 120))
    flip_a_byte(llm.governor._store, min(llm.governor._store._blobs), 5000)
    llm.n_tokens = twin.n_tokens = 100
    np.testing.assert_allclose(logits_after(llm, 5), logits_after(twin, 5), rtol=0, atol=RECOMPUTED)
    assert_map_is_true(llm)


def test_what_a_changed_blob_left_in_the_cache_harms_nobody(open_llm, monkeypatch):
    """Masked rows are multiplied too where flash attention is off: a NaN among them would spread."""
    llm = open_llm(flash_attn=False)
    twin = plain_twin(llm, flash_attn=False)
    llm.eval(TOKENS), twin.eval(TOKENS)
    spill(llm, (20, 123))

    def get(key, tag, buffers) -> None:
        for buffer in buffers:
            buffer[:] = b"\xff" * len(buffer)  # NaN in f16
        raise BlobCorruptError("it was changed on disk")

    with monkeypatch.context() as patch:
        patch.setattr(llm.governor._store, "get", get)
        assert llm.governor.restore().missing == 103
    assert np.isfinite(logits_after(llm, 5)).all()
    assert llm.make_whole() == 0
    llm.n_tokens = 300
    np.testing.assert_allclose(logits_after(llm, 5), logits_after(twin, 5), rtol=0, atol=RECOMPUTED)


def test_the_memory_of_a_failed_restore_goes_back_too(open_llm):
    llm = open_llm(LARGE, n_ctx=4096)
    llm.eval(some_tokens(1500))
    full = anonymous_bytes()
    returned = spill(llm, (20, 1480))
    flip_a_byte(llm.governor._store, min(llm.governor._store._blobs), 5 << 20)
    assert llm.governor.restore().cells == 0
    assert full - anonymous_bytes() > 0.95 * returned > 5 << 20


@pytest.mark.parametrize("field", ["model", "library", "layout", "start"])
def test_a_blob_of_something_else_is_never_loaded(open_llm, field):
    import msgspec

    llm = open_llm()
    llm.eval(TOKENS)
    spill(llm, (20, 120))
    store = llm.governor._store
    key = min(store._blobs)
    other = {field: 7 if field == "start" else "another"}
    store._blobs[key] = store._blobs[key]._replace(
        tag=msgspec.structs.replace(store._blobs[key].tag, **other)
    )
    result = llm.governor.restore()
    assert (result.cells, result.missing) == (0, 100)
    assert llm.make_whole() == 0


def test_models_and_cache_types_have_tags_of_their_own(open_llm, tiny_model, tmp_path):
    import llama_cpp

    copy = tmp_path / "copy.gguf"
    copy.write_bytes(tiny_model(LLAMA).read_bytes())
    same, again, file, kind = (
        open_llm(),
        open_llm(n_ctx=512),
        open_llm(copy),
        open_llm(type_k=llama_cpp.GGML_TYPE_Q8_0, type_v=llama_cpp.GGML_TYPE_Q8_0),
    )
    origins = [llm._engine._origin for llm in (same, again, file, kind)]
    assert origins[0] == origins[1]
    assert origins[0].model != origins[2].model
    assert origins[0].layout != origins[3].layout
    assert "llama-cpp-python" in origins[0].library


def test_a_store_that_is_full_half_way_evicts_the_rest_and_says_so(open_llm, monkeypatch):
    llm = open_llm(settings={"store_limit_bytes": 150_000})
    twin = plain_twin(llm)
    monkeypatch.setattr(engine_module, "_BLOB_BYTES", 40 * llm._engine.cell_bytes)
    llm.eval(TOKENS), twin.eval(TOKENS)
    events = []
    llm.governor.subscribe(events.append)
    result = llm.governor.trim(1.0)
    assert 0 < result.spilled < result.cells
    assert result.spilled % 40 == 0
    assert "would pass the store's limit" in result.problem
    assert [event.what for event in events if isinstance(event, Degraded)] == ["spill"]
    status = llm.governor.status()
    assert (status.spilled_cells, status.lost_cells) == (result.spilled, result.cells - result.spilled)
    assert llm.make_whole() == 0
    np.testing.assert_allclose(logits_after(llm, 5), logits_after(twin, 5), rtol=0, atol=RECOMPUTED)


def test_without_a_store_everything_is_evicted(open_llm):
    llm = open_llm(settings={"store": "none", "store_dir": ""})
    llm.eval(TOKENS)
    result = llm.governor.trim(1.0)
    assert (result.spilled, result.cells) == (0, llm.governor.status().lost_cells)
    assert llm.make_whole() == 0
    assert_map_is_true(llm)


def test_a_cell_map_that_went_wrong_stops_the_governor_and_not_the_model(open_llm):
    llm = open_llm()
    llm.eval(TOKENS)
    cells = llm._engine.track.map._cell_of
    cells[100], cells[150] = cells[150], cells[100]
    with pytest.raises(EngineError, match="row of position 100 is not where it was expected"):
        llm._engine.trim([Range(100, 200)], llm.governor._store)
    assert llm._engine.ledger.count(LIVE) == 300
    assert llm._engine.release() == 0
    llm.governor.step()
    assert llm.create_completion(TOKENS[:200], max_tokens=4)["usage"]["completion_tokens"] > 0
    llm.reset()
    llm.eval(TOKENS)
    assert llm.governor.trim(1.0).cells > 0


def test_a_failed_decode_leaves_what_was_there(open_llm, monkeypatch):
    import llama_cpp

    llm = open_llm(n_batch=64, n_ubatch=16)
    twin = plain_twin(llm, n_batch=64, n_ubatch=16)
    llm.eval(TOKENS), twin.eval(TOKENS)
    calls = []

    @llama_cpp.ggml_abort_callback
    def abort_in_the_third_micro_batch(_: object) -> bool:
        calls.append(len(calls))
        return len(llm._tap.cells()) > 32

    llama_cpp.llama_set_abort_callback(llm.ctx, abort_in_the_third_micro_batch, None)
    with pytest.raises(RuntimeError, match="llama_decode returned 2"):
        llm.eval(some_tokens(64, seed=4))
    assert calls
    llama_cpp.llama_set_abort_callback(llm.ctx, llama_cpp.ggml_abort_callback(), None)
    assert_map_is_true(llm)
    spill(llm, (20, 200))
    llm.governor.restore()
    np.testing.assert_array_equal(logits_after(llm, 5), logits_after(twin, 5))
    assert len(llm._engine.ledger) == 301


def test_an_aborted_recompute_keeps_what_it_has_and_goes_on_later(open_llm):
    import llama_cpp

    llm = open_llm(n_batch=64, n_ubatch=16)
    twin = plain_twin(llm, n_batch=64, n_ubatch=16)
    llm.eval(TOKENS), twin.eval(TOKENS)
    evict(llm, (20, 120))

    @llama_cpp.ggml_abort_callback
    def abort_in_the_third_micro_batch(_: object) -> bool:
        return len(llm._tap.cells()) > 32

    llama_cpp.llama_set_abort_callback(llm.ctx, abort_in_the_third_micro_batch, None)
    with pytest.raises(RuntimeError, match="llama_decode returned 2"):
        llm.make_whole()
    assert_map_is_true(llm)
    assert llm._engine.ledger.count(LOST) == 100 - 32
    llama_cpp.llama_set_abort_callback(llm.ctx, llama_cpp.ggml_abort_callback(), None)
    assert llm.make_whole() == 0
    np.testing.assert_allclose(logits_after(llm, 5), logits_after(twin, 5), rtol=0, atol=RECOMPUTED)
    assert_map_is_true(llm)


def test_what_a_slow_store_has_not_taken_by_the_deadline_is_evicted(open_llm, monkeypatch):
    """The rows that are in the store come back as they were, the others are decoded again."""
    llm = open_llm(n_ctx=1024)
    llm.eval(TOKENS)
    monkeypatch.setattr(engine_module, "_BLOB_BYTES", 32 * llm._engine.cell_bytes)
    store = llm.governor._store
    put = store.put

    def slowly(*arguments):
        time.sleep(0.05)
        return put(*arguments)

    monkeypatch.setattr(store, "put", slowly)
    result = llm._engine.trim([Range(32, 224)], store, 0.07)
    assert (result.cells, result.spilled) == (192, 64)
    assert result.problem == "the store did not take it in 0.07 s"
    assert_map_is_true(llm)
    assert llm.make_whole() == 0
    assert_map_is_true(llm)
