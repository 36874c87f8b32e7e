"""The engine for llama.cpp on real contexts: what it gives up, what comes back, and what is told."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from gguf_models import HYBRID, LARGE, LARGE_HYBRID, LARGE_SLIDING, MAMBA, SLIDING
from psi_kv_governor.cache import Plan, Range, Step, Verb
from psi_kv_governor.engines.llama.client import Client, InProcess
from psi_kv_governor.engines.llama.engine import LlamaEngine

pytestmark = pytest.mark.llama
N_TOKENS = 1200
TOKENS = list(np.random.default_rng(5).integers(3, 250, N_TOKENS))
CELL_BYTES = 8192  # of LARGE


@pytest.fixture(params=["file", "memory"])
def backing(request) -> str:
    return request.param


@pytest.fixture
def open_llm(tiny_model, folder, agent, backing):
    """Opens a plain `llama_cpp.Llama` with an engine over its caches."""
    import llama_cpp

    opened = []

    def open_(shape=LARGE, *, place=True, **arguments):
        agent.configure(
            str(folder) if place else "", in_file=backing == "file" and place, reserve_bytes=0, limit_bytes=0
        )
        chosen = {"n_ctx": 4096, "n_threads": 1, "n_threads_batch": 1, "verbose": False, "flash_attn": True}
        llm = llama_cpp.Llama(str(tiny_model(shape)), **{**chosen, **arguments})
        address = ctypes.cast(llm.ctx, ctypes.c_void_p).value
        engine = LlamaEngine(
            Client(InProcess(agent.serve)),
            pid=1,
            place=str(folder) if place else "",
            backing=backing,
            context=lambda: address,
        )
        opened.append(llm)
        return llm, engine

    yield open_
    for llm in opened:
        llm.close()


def logits(llm) -> np.ndarray:
    import llama_cpp

    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),)).copy()


def whole_state(llm) -> bytes:
    import llama_cpp

    size = llama_cpp.llama_state_get_size(llm.ctx)
    buffer = (ctypes.c_uint8 * size)()
    return bytes(buffer)[: llama_cpp.llama_state_get_data(llm.ctx, buffer, size)]


def do(engine, verb, *ranges, sequence=0, **bounds):
    (cache,) = [c for c in engine.snapshot().caches if c.maskable or len(engine.snapshot().caches) == 1]
    step = Step(verb=verb, cache=cache.id, sequence=sequence, ranges=tuple(Range(*part) for part in ranges))
    return engine.apply(Plan(steps=(step,), **bounds))


def resident(llm, engine) -> int:
    return sum(region.resident for region in engine.client.regions(count_resident=True) if region.context)


def test_a_new_cache_takes_no_memory_until_it_is_used(open_llm, agent):
    open_llm()
    newest = Client(InProcess(agent.serve)).regions(count_resident=True)[-1]
    assert newest.size > 30 << 20
    assert newest.resident < 1 << 20


def test_masked_ranges_go_back_to_the_system_and_come_back_bit_for_bit(open_llm):
    llm, engine = open_llm()
    llm.eval(TOKENS)
    before = whole_state(llm)
    result = do(engine, Verb.MASK, (100, 1100))
    assert result.problem == ""
    assert (result.cells, result.masked) == (1000, 1000)
    assert result.bytes_returned >= 0.98 * 1000 * CELL_BYTES
    (sequence,) = engine.snapshot().caches[0].sequences
    assert sequence.masked == (Range(100, 1100),)
    assert sequence.live == (Range(0, 100), Range(1100, N_TOKENS))
    back = do(engine, Verb.UNMASK)
    assert back.bytes_back >= 0.98 * 1000 * CELL_BYTES
    assert whole_state(llm) == before
    assert engine.snapshot().caches[0].sequences[0].masked == ()


def test_masked_cells_are_not_read_and_do_not_count(open_llm):
    llm, engine = open_llm()
    llm.eval(TOKENS)
    do(engine, Verb.MASK, (100, 1100))
    parked = resident(llm, engine)
    llm.eval(TOKENS[:1])
    assert resident(llm, engine) - parked < 0.05 * 1000 * CELL_BYTES
    assert engine.snapshot().caches[0].sequences[0].affected == 1
    assert engine.first_affected(0) == N_TOKENS


def test_a_mask_of_no_sequence_touches_nothing(open_llm):
    llm, engine = open_llm()
    llm.eval(TOKENS)
    assert "none was named" in do(engine, Verb.MASK, (100, 1100), sequence=None).problem
    assert engine.snapshot().caches[0].sequences[0].parked_bytes == 0


def test_a_parked_sequence_is_read_back_by_whoever_decodes_it(open_llm):
    llm, engine = open_llm()
    llm.eval(TOKENS)
    state = whole_state(llm)
    result = do(engine, Verb.PARK)
    assert result.bytes_returned >= 0.98 * N_TOKENS * CELL_BYTES
    assert whole_state(llm) == state
    assert engine.snapshot().caches[0].sequences[0].affected == 0


def test_what_is_parked_twice_is_written_once(open_llm, backing):
    llm, engine = open_llm()
    llm.eval(TOKENS)
    first = do(engine, Verb.PARK)
    do(engine, Verb.UNPARK)
    again = do(engine, Verb.PARK)
    assert again.bytes_returned >= 0.95 * N_TOKENS * CELL_BYTES
    assert again.written_bytes == 0
    if backing == "memory":
        assert first.written_bytes >= 0.98 * N_TOKENS * CELL_BYTES


def test_what_is_parked_is_what_was_asked_for_and_not_all_the_free_cells_beside_it(open_llm):
    """In a cache of 131,072 cells each trim looked at all of them, 16 GB, for a conversation of 1,024."""
    import llama_cpp

    llm, engine = open_llm()
    llm.eval(TOKENS)
    llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(llm.ctx), 0, 800, -1)
    before = resident(llm, engine)
    result = do(engine, Verb.MASK, (300, 800))
    assert result.masked == 500
    assert 480 * CELL_BYTES < result.bytes_returned < 520 * CELL_BYTES
    assert before - resident(llm, engine) == result.bytes_returned  # the free ones are there still


def test_tokens_decoded_into_masked_cells_are_seen(open_llm):
    """A cell that llama.cpp gave to another token is that token's, whatever it was before."""
    llm, engine = open_llm()
    twin, _ = open_llm()
    for one in (llm, twin):
        one.eval(TOKENS)
    do(engine, Verb.MASK, (100, 1100))
    for one in (llm, twin):
        one.reset()
        one.eval(TOKENS[300:900])
    np.testing.assert_array_equal(logits(llm), logits(twin))
    assert engine.snapshot().caches[0].sequences[0].masked == ()


def test_a_restore_stops_where_its_bytes_or_its_time_are_up(open_llm):
    llm, engine = open_llm()
    llm.eval(TOKENS)
    do(engine, Verb.MASK, (100, 1100))
    part = do(engine, Verb.UNMASK, max_bytes=1 << 20)
    assert not part.done
    assert 1 << 20 <= part.bytes_back < 3 << 20
    assert not do(engine, Verb.UNMASK, deadline_s=1e-6).done
    assert do(engine, Verb.UNMASK).done


def test_a_full_disk_changes_nothing(open_llm, backing, agent, folder):
    llm, engine = open_llm()
    llm.eval(TOKENS[:800])
    state = whole_state(llm)
    agent.configure(str(folder), in_file=False, reserve_bytes=1 << 60, limit_bytes=0)
    result = do(engine, Verb.PARK)
    if backing == "memory":
        assert "free" in result.problem
        assert result.bytes_returned == 0
    assert whole_state(llm) == state


def test_without_a_place_nothing_is_parked_and_it_says_so(open_llm):
    llm, engine = open_llm(place=False)
    llm.eval(TOKENS[:500])
    engine.snapshot()
    able = engine.describe().capabilities
    assert not able.park.able
    assert "no place" in able.park.why
    assert able.evict.able
    assert "no place" in do(engine, Verb.PARK).problem
    assert able.release.able


@pytest.mark.parametrize("shape", [HYBRID, MAMBA, SLIDING], ids=lambda shape: shape.arch)
def test_every_kind_of_cache_runs_as_without_us(open_llm, shape):
    llm, engine = open_llm(shape, n_ctx=2048)
    twin, _ = open_llm(shape, n_ctx=2048)
    for one in (llm, twin):
        one.eval(TOKENS[:300])
    for cache in engine.snapshot().caches:
        engine.apply(
            Plan(steps=tuple(Step(verb=Verb.PARK, cache=cache.id, sequence=s.id) for s in cache.sequences))
        )
    for one in (llm, twin):
        one.eval(TOKENS[300:340])
    np.testing.assert_array_equal(logits(llm), logits(twin))


@pytest.mark.parametrize("shape", [LARGE_HYBRID, LARGE_SLIDING], ids=lambda shape: shape.arch)
def test_caches_that_can_not_be_masked_can_be_parked_when_idle(open_llm, shape):
    llm, engine = open_llm(shape, n_ctx=4096)
    llm.eval(TOKENS)
    state = whole_state(llm)
    returned = 0
    for cache in engine.snapshot().caches:
        for sequence in cache.sequences:
            step = Step(verb=Verb.PARK, cache=cache.id, sequence=sequence.id)
            returned += engine.apply(Plan(steps=(step,))).bytes_returned
    assert returned > 4 << 20
    assert whole_state(llm) == state


def test_without_flash_attention_a_whole_cache_can_be_parked(open_llm):
    llm, engine = open_llm(flash_attn=False)
    llm.eval(TOKENS)
    state = whole_state(llm)
    (cache,) = engine.snapshot().caches
    assert not cache.maskable
    assert "flash" in cache.why_not_maskable
    step = Step(verb=Verb.PARK, cache=cache.id, sequence=0)
    assert engine.apply(Plan(steps=(step,))).bytes_returned >= 0.95 * N_TOKENS * CELL_BYTES
    assert whole_state(llm) == state


def test_attention_is_sampled_for_every_position_that_is_far_enough(open_llm):
    llm, engine = open_llm()
    engine.collect(frozenset({"attention"}))
    llm.eval(TOKENS[:512])
    llm.eval(TOKENS[512:])
    (cache,) = engine.snapshot().caches
    evidence = engine.evidence(cache.id, 0)
    assert evidence.why_not("attention") == ""
    seen = evidence.attention(Range(0, N_TOKENS))
    assert np.isfinite(seen[:800]).all()
    assert seen[:800].mean() == pytest.approx(1.0, abs=0.5)
    engine.collect(frozenset())


def test_keys_are_told_of_live_cells_only(open_llm):
    llm, engine = open_llm()
    llm.eval(TOKENS[:1000])
    (cache,) = engine.snapshot().caches
    norms = engine.evidence(cache.id, 0).key_norms(Range(0, 1000))
    assert norms.mean() == pytest.approx(1.0, abs=1e-3)
    do(engine, Verb.MASK, (100, 200))
    norms = engine.evidence(cache.id, 0).key_norms(Range(0, 1000))
    assert np.isnan(norms[100:200]).all()
    assert np.isfinite(norms[200:]).all()


def test_a_closed_model_is_gone_from_the_snapshot(open_llm):
    llm, engine = open_llm()
    llm.eval(TOKENS[:100])
    assert len(engine.snapshot().caches) == 1
    llm.close()
    assert engine.snapshot().caches == ()


def test_a_snapshot_waits_for_nobody(open_raw, client, pausing, backing):
    """A long prompt is being decoded, in one call: what was known before it is told."""
    context = open_raw(in_file=backing == "file", unified=True, n_ubatch=64, callback=pausing.function)
    address = ctypes.cast(context.ctx, ctypes.c_void_p).value
    engine = LlamaEngine(client, pid=1, place="", backing=backing, context=lambda: address)
    assert context.decode([(3 + at, at, 0) for at in range(100)]) == 0
    assert engine.snapshot().caches[0].sequences[0].next_position == 100
    decoding = pausing.decode(context, 100, 250)  # in four graphs, the first of which stands still
    (cache,) = engine.snapshot().caches
    assert pausing.stands
    assert cache.sequences[0].next_position >= 100
    pausing.goes_on.set()
    while decoding.is_alive():
        assert len(engine.snapshot().caches) == 1
    pausing.go_on(decoding)
    assert engine.snapshot().caches[0].sequences[0].next_position == 350
