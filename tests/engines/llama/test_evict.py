"""Without a place to park: cells are removed for good, by llama.cpp's own calls between two of the program's,
and whatever builds on what is left says so. What is left is what a twin has of which the same was removed."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator

import pytest
from evict_help import CELL_BYTES, TOKENS, Context

from gguf_models import HYBRID, LARGE, LARGE_SLIDING
from psi_kv_governor.cache import Plan, Range, Step, Verb
from psi_kv_governor.engines.llama.client import Client, InProcess
from psi_kv_governor.engines.llama.engine import LlamaEngine

pytestmark = pytest.mark.llama


@pytest.fixture
def opened(tiny_model, agent) -> Iterator:
    """Opens contexts without a place to park, each with an engine over it."""
    with contextlib.ExitStack() as stack:

        def open_(shape=LARGE, **settings) -> tuple[Context, LlamaEngine]:
            agent.configure("", in_file=False, reserve_bytes=0, limit_bytes=0)
            context = Context(str(tiny_model(shape)), **settings)
            stack.callback(context.close)
            address = ctypes.cast(context.ctx, ctypes.c_void_p).value
            client = Client(InProcess(agent.serve))
            engine = LlamaEngine(client, pid=1, place="", backing="memory", context=lambda: address)
            return context, engine

        yield open_


def evict(engine, *ranges: Range, sequence: int = 0, **bounds):
    cache = next(cache for cache in engine.snapshot().caches if cache.evictable)
    return engine.apply(
        Plan(steps=(Step(verb=Verb.EVICT, cache=cache.id, sequence=sequence, ranges=ranges),), **bounds)
    )


def sequences(engine):
    cache = next(cache for cache in engine.snapshot().caches if cache.evictable)
    return {one.id: one for one in cache.sequences}


def test_what_is_evicted_is_gone_and_what_remains_is_that_of_a_twin(opened):
    (ours, engine), (theirs, _) = opened(), opened()
    for one in (ours, theirs):
        for sequence in range(3):
            for at in range(0, 900, 300):
                one.decode(TOKENS[at : at + 300], at, sequence)
    result = evict(engine, Range(100, 400), Range(500, 700), sequence=1)
    theirs.remove(100, 400, 1)
    theirs.remove(500, 700, 1)
    assert result.problem == ""
    assert (result.cells, result.lost, result.masked) == (500, 500, 0)
    assert result.bytes_returned >= 0.9 * 500 * CELL_BYTES
    assert ours.state() == theirs.state()
    told = sequences(engine)
    assert told[1].lost == (Range(100, 400), Range(500, 700))
    assert told[1].live == (Range(0, 100), Range(400, 500), Range(700, 900))
    assert told[0].lost == told[2].lost == ()
    for one in (ours, theirs):
        for sequence in range(3):
            one.decode(TOKENS[1000:1070], 900, sequence)
    assert ours.state() == theirs.state()
    told = sequences(engine)
    assert (told[0].affected, told[1].affected, told[2].affected) == (0, 70, 0)


def test_cells_that_another_sequence_has_too_stay_there(opened):
    (ours, engine), (theirs, _) = opened(), opened()
    for one in (ours, theirs):
        one.decode(TOKENS[:500], 0)
        one.api.llama_memory_seq_cp(one.memory, 0, 1, -1, -1)
        one.decode(TOKENS[500:800], 500, 1)
    result = evict(engine, Range(64, 700), sequence=1)
    theirs.remove(64, 700, 1)
    assert result.bytes_returned <= 200 * CELL_BYTES  # 436 of them are the first one's
    assert ours.state() == theirs.state()
    for one in (ours, theirs):
        one.decode(TOKENS[900:940], 500, 0)
        one.decode(TOKENS[900:940], 800, 1)
    assert ours.state() == theirs.state()


@pytest.mark.parametrize("unified", [True, False])
def test_it_happens_between_two_calls_and_never_inside_of_one(opened, unified):
    """Calls of eight micro-batches, while another thread evicts: which call was the first to go without says
    the cache itself. A twin of which the same was removed before that call is the same to the last byte."""
    settings = {"kv_unified": unified, "n_ubatch": 8}
    (ours, engine), (theirs, _) = opened(**settings), opened(**settings)
    ours.decode(TOKENS[:512], 0)
    part, begun = Range(64, 300), threading.Event()
    results = []

    def evict_once() -> None:
        begun.wait()
        while not results or not results[-1].lost:  # each waits for the end of a call
            results.append(evict(engine, part))

    thread = threading.Thread(target=evict_once)
    thread.start()
    calls = [0]
    for at in range(512, 1024, 64):
        calls.append(at)
        begun.set()
        ours.decode(TOKENS[at : at + 64], at)
    thread.join()
    cells = engine.client.cells(next(iter(engine._regions)), 0)
    affected = cells[(cells[:, 1] & 8) != 0, 0].tolist()
    first = affected[0] if affected else 1024
    assert affected == list(range(first, 1024))
    assert first in {*calls, 1024}
    for at in calls:
        if at == first:
            theirs.remove(part.start, part.stop)
        theirs.decode(TOKENS[at : at + (64 if at else 512)], at)
    if first == 1024:
        theirs.remove(part.start, part.stop)
    assert ours.state() == theirs.state()


def test_what_the_program_removes_or_decodes_itself_is_not_lost_any_more(opened):
    context, engine = opened()
    context.decode(TOKENS[:500], 0)
    evict(engine, Range(100, 200), Range(300, 400))
    context.remove(250, -1)
    assert sequences(engine)[0].lost == (Range(100, 200),)
    context.api.llama_memory_seq_cp(context.memory, 0, 2, -1, -1)
    assert sequences(engine)[2].lost == (Range(100, 200),)
    context.remove(20, 40)
    context.api.llama_memory_seq_add(context.memory, 0, 40, -1, -20)
    told = sequences(engine)
    assert told[0].lost == (Range(80, 180),)
    assert told[2].lost == (Range(100, 200),)
    context.remove(50, -1)
    context.decode(TOKENS[:100], 50)
    assert sequences(engine)[0].lost == ()
    assert sequences(engine)[0].affected == 0
    context.api.llama_memory_clear(context.memory, True)
    assert sequences(engine) == {}


def test_a_copy_that_is_shifted_at_once_is_evicted_by_its_new_positions(opened):
    (ours, engine), (theirs, _) = opened(), opened()
    for one in (ours, theirs):
        one.decode(TOKENS[:300], 0)
    assert sequences(engine)[0].live == (Range(0, 300),)
    for one in (ours, theirs):
        one.api.llama_memory_seq_cp(one.memory, 0, 1, -1, -1)
        one.remove(-1, -1, 0)
        one.api.llama_memory_seq_add(one.memory, 1, 100, -1, 20)  # and nobody asked for cells in between
    assert sequences(engine)[1].live == (Range(0, 100), Range(120, 320))
    evict(engine, Range(200, 240), sequence=1)
    theirs.remove(200, 240, 1)
    assert ours.state() == theirs.state()


def test_a_saved_state_brings_what_it_lacks_along(opened):
    context, engine = opened()
    context.decode(TOKENS[:500], 0)
    evict(engine, Range(100, 200))
    size = context.api.llama_state_seq_get_size(context.ctx, 0)
    buffer = (ctypes.c_uint8 * size)()
    context.api.llama_state_seq_get_data(context.ctx, buffer, size, 0)
    context.remove(-1, -1)
    assert context.api.llama_state_seq_set_data(context.ctx, buffer, size, 3) == size
    assert sequences(engine)[3].lost == (Range(100, 200),)
    context.decode(TOKENS[:5], 500, 3)
    assert sequences(engine)[3].affected == 5


def test_no_more_goes_than_was_asked_for_and_the_last_token_stays(opened):
    context, engine = opened()
    context.decode(TOKENS[:500], 0)
    assert evict(engine, Range(100, 400), max_bytes=10 * CELL_BYTES).lost == 10
    assert evict(engine, Range(0, 1000)).lost == 489
    assert sequences(engine)[0].live == (Range(499, 500),)
    context.decode(TOKENS[:5], 500)


@pytest.mark.parametrize("shape", [HYBRID, LARGE_SLIDING], ids=lambda shape: shape.arch)
def test_other_kinds_of_cache_go_on_as_a_twin_does(opened, shape):
    (ours, engine), (theirs, _) = opened(shape, n_ctx=8192), opened(shape, n_ctx=8192)
    for one in (ours, theirs):
        one.decode(TOKENS[:500], 0)
    result = evict(engine, Range(100, 300))
    theirs.remove(100, 300)
    assert result.lost == 200
    for one in (ours, theirs):
        one.decode(TOKENS[500:560], 500)
    assert ours.state() == theirs.state()


def test_where_there_is_a_place_nothing_is_thrown_away(opened, folder):
    context, engine = opened()
    context.decode(TOKENS[:500], 0)
    address = ctypes.cast(context.ctx, ctypes.c_void_p).value
    with_place = LlamaEngine(
        engine.client, pid=1, place=str(folder), backing="memory", context=lambda: address
    )
    with_place.snapshot()
    assert not with_place.describe().capabilities.evict.able
    assert "nothing is thrown away" in evict(with_place, Range(100, 200)).problem
    assert sequences(engine)[0].lost == ()
