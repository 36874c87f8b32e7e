"""The contract: what is told, what is done, and what evidence there is."""

import math
import threading

import pytest
import torch
from tiny import COUNT, do, filled, next_logits, prompt, tiny_config, tiny_model, with_cache

from major_faults import major_faults_of
from psi_kv_governor.cache import Plan, Range, Step, Verb
from psi_kv_governor.engines.transformers.engine import TransformersEngine
from psi_kv_governor.errors import EngineError
from transformers import DynamicCache
from waiting import until


@pytest.mark.parametrize("backing", ["memory", "file"])
def test_an_idle_cache_is_parked_and_read_back(engine, model, place, backing):
    cache = filled(model, place, prompt(500), backing=backing, max_cells=600)
    engine.add(cache)
    expected = next_logits(model, cache, prompt(4))

    def all_is_there() -> bool:
        (state,) = engine.snapshot().caches
        return state.resident_bytes >= 500 * cache.cell_bytes and state.sequences[0].parked_bytes == 0

    until(all_is_there)  # a page that the kernel is just moving looks for a moment as if it had gone
    result = do(engine, Verb.PARK, cache)
    assert (result.problem, result.done) == ("", True)
    assert result.bytes_returned >= 0.98 * 500 * cache.cell_bytes
    after = engine.snapshot().caches[0]
    assert after.resident_bytes == 0
    assert after.sequences[0].parked_bytes >= 500 * cache.cell_bytes
    assert after.sequences[0].live == (Range(0, 500),)
    result = do(engine, Verb.UNPARK, cache, max_bytes=4096 * 3)
    assert (result.bytes_back, result.done) == (4096 * 3, False)
    assert do(engine, Verb.UNPARK, cache).done
    assert engine.snapshot().caches[0].sequences[0].dirty_bytes == 0
    assert torch.equal(next_logits(model, cache, prompt(4)), expected)


@pytest.mark.parametrize("backing", ["memory", "file"])
def test_the_next_pass_reads_a_parked_cache_at_once_and_not_page_by_page(engine, model, place, backing):
    cache = filled(model, place, prompt(2000), backing=backing, max_cells=2048)
    engine.add(cache)
    next_logits(model, cache, prompt(2))  # what torch itself reads for the first token of its kind
    faults = []
    for _ in range(3):  # the least counts: code of torch that the kernel took meanwhile is read page by page
        assert do(engine, Verb.PARK, cache).done
        assert engine.snapshot().caches[0].resident_bytes == 0
        faults.append(major_faults_of(lambda: next_logits(model, cache, prompt(2))))
    assert min(faults) < 2000 * cache.cell_bytes // 4096 // 4


def test_pages_of_cropped_rows_are_released(engine, model, place):
    cache = filled(model, place, prompt(500))
    engine.add(cache)
    cache.crop(-400)
    free = engine.snapshot().caches[0].free_resident_bytes
    assert free >= 0.95 * 400 * cache.cell_bytes
    assert do(engine, Verb.RELEASE, cache).bytes_returned == free
    assert engine.snapshot().caches[0].free_resident_bytes == 0


def test_a_running_pass_is_waited_for_and_no_longer_than_allowed(engine, model, place):
    cache = filled(model, place, prompt(50))
    engine.add(cache)
    inside, leave = threading.Event(), threading.Event()

    def stop_in_the_middle(module, args, output):
        inside.set()
        assert leave.wait(60)

    hook = model.model.layers[1].register_forward_hook(stop_in_the_middle)

    def decode():
        with torch.no_grad():
            model(prompt(1), **with_cache(cache))

    thread = threading.Thread(target=decode)
    thread.start()
    assert inside.wait(60)
    assert engine.snapshot().caches[0].sequences[0].running
    assert "did not end in time" in do(engine, Verb.PARK, cache, deadline_s=0.05).problem
    leave.set()
    assert do(engine, Verb.PARK, cache).problem == ""
    thread.join()
    hook.remove()


def test_a_pass_that_fails_in_the_middle_leaves_the_cache_as_it_was(engine, model, place):
    cache = filled(model, place, prompt(50))
    expected = next_logits(model, cache, prompt(4))

    def fail(module, args, output):
        raise RuntimeError("no")

    hook = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        model(prompt(3), **with_cache(cache))
    hook.remove()
    assert {layer.get_seq_length() for layer in cache.layers} == {50}
    assert not cache.running
    assert torch.equal(next_logits(model, cache, prompt(4)), expected)


def test_closing_takes_all_masks_off(model, place):
    engine = TransformersEngine(place)
    cache = filled(model, place, prompt(100))
    expected = next_logits(model, cache, prompt(4))
    engine.add(cache)
    cache.take_out([Range(10, 60)], keep=True)
    engine.close()
    engine.close()
    assert cache.places.masked == ()
    assert torch.equal(next_logits(model, cache, prompt(4)), expected)
    with pytest.raises(EngineError):
        engine.snapshot()


def test_a_cache_that_is_gone_is_governed_no_more(engine, model, place):
    cache = filled(model, place, prompt(10))
    engine.add(cache)
    number = cache.id
    assert [it.id for it in engine.snapshot().caches] == [number]
    del cache
    assert engine.snapshot().caches == ()
    result = engine.apply(Plan(steps=(Step(verb=Verb.PARK, cache=number),)))
    assert f"no cache {number}" in result.problem
    with pytest.raises(EngineError):
        engine.evidence(number, 0)


def test_hooks_of_a_cache_go_with_it(engine, model, place):
    before = sum(len(module._forward_pre_hooks) for module in model.modules())
    engine.collect(frozenset({"attention"}))
    for _ in range(3):
        cache = filled(model, place, prompt(10))
        engine.add(cache)
        del cache
    after = sum(len(module._forward_pre_hooks) for module in model.modules())
    assert after - before <= 1  # the one that tells caches of passes


def test_sliding_layers_stay_stock_while_the_others_are_governed(engine, place):
    from transformers import Gemma2Config

    config = tiny_config(
        Gemma2Config, num_hidden_layers=4, head_dim=16, sliding_window=16, max_position_embeddings=512
    )
    model = tiny_model("eager", config=config)
    ids, mask = prompt(50), {"attention_mask": torch.ones(1, 50, dtype=torch.long)}
    from psi_kv_governor.engines.transformers.cache import GovernedCache

    expected = model.generate(ids, **mask, **COUNT, **with_cache(DynamicCache(config=config)))
    cache = GovernedCache(model, place=place)
    engine.add(cache)
    assert torch.equal(model.generate(ids, **mask, **COUNT, **with_cache(cache)), expected)
    assert len(cache.governed) == 2
    result = do(engine, Verb.MASK, cache)
    assert result.masked > 0
    assert model(prompt(1), **with_cache(cache)).logits.isfinite().all()


def test_the_cell_is_all_governed_layers_of_the_whole_batch(engine, place):
    model = tiny_model(config=tiny_config(num_hidden_layers=5))
    cache = filled(model, place, prompt(7, batch=3))
    engine.add(cache)
    state = engine.snapshot().caches[0]
    assert state.cell_bytes == 5 * 2 * 3 * 2 * 16 * 4
    assert state.row_bytes == 16 * 4
    assert state.capacity_cells == 4096
    assert state.sequences[0].next_position == 7
    assert math.isfinite(engine.snapshot().time_s)


def test_what_it_can_do_is_told_with_the_reason(place):
    able = TransformersEngine(place).describe()
    assert (able.engine, able.place) == ("transformers", place.folder)
    assert able.capabilities.park.able
    assert able.capabilities.mask.able
    assert "nothing is thrown away" in able.capabilities.evict.why
    unable = TransformersEngine(None, "a tmpfs everywhere").describe()
    assert unable.capabilities.park.why == "a tmpfs everywhere"
    assert unable.capabilities.evict.able
    assert unable.capabilities.release.able


def test_parking_stops_when_the_bytes_are_up(engine, model, place):
    cache = filled(model, place, prompt(500))
    engine.add(cache)
    result = do(engine, Verb.PARK, cache, max_bytes=100_000)
    assert not result.done
    assert 100_000 <= result.bytes_returned < 500 * cache.cell_bytes
    assert result.cells == 0  # no sequence is parked whole yet
    assert do(engine, Verb.PARK, cache).cells == 500
