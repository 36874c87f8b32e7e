"""The contract: what is told, what is done, and what evidence there is."""

import math
import threading

import numpy as np
import pytest
import torch
from tiny import COUNT, VOCABULARY, filled, next_logits, prompt, tiny_config, tiny_model, with_cache

from psi_kv_governor.cache import Plan, Range, Step, Verb
from psi_kv_governor.engines.transformers.engine import TransformersEngine
from psi_kv_governor.errors import EngineError
from psi_kv_governor.policy import get_policy
from transformers import DynamicCache


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def engine(place):
    made = TransformersEngine(place)
    yield made
    made.close()


def do(engine, verb, cache, **limits):
    return engine.apply(Plan(steps=(Step(verb=verb, cache=cache.id),), **limits))


@pytest.mark.parametrize("backing", ["memory", "file"])
def test_an_idle_cache_is_parked_and_read_back(engine, model, place, backing):
    cache = filled(model, place, prompt(500), backing=backing, max_cells=600)
    engine.add(cache)
    expected = next_logits(model, cache, prompt(4))
    before = engine.snapshot().caches[0]
    assert before.resident_bytes >= 500 * cache.cell_bytes
    assert before.sequences[0].parked_bytes == 0
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
        assert leave.wait(30)

    hook = model.model.layers[1].register_forward_hook(stop_in_the_middle)

    def decode():
        with torch.no_grad():
            model(prompt(1), **with_cache(cache))

    thread = threading.Thread(target=decode)
    thread.start()
    assert inside.wait(30)
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


def test_evidence_of_keys_is_that_of_the_keys(engine, model, place):
    cache = filled(model, place, prompt(80))
    engine.add(cache)
    keys = torch.stack([layer.keys[0].clone() for layer in cache.layers])  # [layers, heads, rows, width]
    norms = keys.norm(dim=-1)
    expected = (norms / norms.mean(-1, keepdim=True)).mean((0, 1)).numpy()
    evidence = engine.evidence(cache.id, 0)
    np.testing.assert_allclose(evidence.key_norms(Range(0, 80)), expected, rtol=1e-5)
    unit = keys / keys.norm(dim=-1, keepdim=True)
    anchor = unit.mean(-2, keepdim=True)
    cosine = (unit * anchor).sum(-1) / anchor.norm(dim=-1)
    np.testing.assert_allclose(evidence.key_diffs(Range(5, 70)), -cosine.mean((0, 1))[5:70], rtol=1e-4)
    cache.take_out([Range(20, 40)], keep=True)
    known = evidence.key_norms(Range(10, 50))
    assert np.isnan(known[10:30]).all()
    assert np.isfinite(known[:10]).all()
    assert np.isfinite(known[30:]).all()


def test_attention_is_what_the_model_itself_attends_to(engine, place):
    """Against the attention weights that eager attention gives out."""
    model = tiny_model("eager")
    cache = filled(model, place, prompt(60))
    engine.add(cache)
    engine.collect(frozenset({"attention"}))
    weights = []
    for token in prompt(40, seed=5)[0]:
        output = model(token.view(1, 1), output_attentions=True, **with_cache(cache))
        row = torch.stack(output.attentions).mean((0, 1, 2))[0]  # three layers: all are sampled
        weights.append(torch.nn.functional.pad(row, (0, 100 - len(row))))
    mean = torch.stack(weights[-32:]).mean(0).numpy() * 100
    pooled = np.convolve(mean, np.ones(5), "same") / np.convolve(np.ones(100), np.ones(5), "same")
    evidence = engine.evidence(cache.id, 0)
    assert evidence.why_not("attention") == ""
    np.testing.assert_allclose(evidence.attention(Range(0, 100)), pooled, rtol=1e-3)
    used = evidence.last_used(Range(0, 100))
    newest = (torch.stack(weights[-32:]).numpy() * 100 > 1).astype(int) * np.arange(69, 101)[:, None]
    np.testing.assert_array_equal(used, newest.max(0))


def test_attention_that_cant_be_made_again_is_refused_by_name(engine, place):
    from transformers import GPTNeoXConfig

    model = tiny_model(
        config=GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )
    cache = filled(model, place, prompt(40))
    engine.add(cache)
    engine.collect(frozenset({"attention"}))
    evidence = engine.evidence(cache.id, 0)
    assert "no projections that can be repeated" in evidence.why_not("attention")
    assert np.isfinite(evidence.key_norms(Range(0, 40))).all()


@pytest.mark.parametrize(
    "name", ["window", "keynorm", "keydiff", "attention", "lru", "hybrid", "fifo", "random"]
)
def test_each_of_our_policies_chooses_on_this_evidence(engine, model, place, name):
    from psi_kv_governor.policy.base import Range as PolicyRange
    from psi_kv_governor.policy.select import Protection, select

    cache = filled(model, place, prompt(200))
    engine.add(cache)
    policy = get_policy(name)
    engine.collect(policy.needs)
    model(prompt(40, seed=4), **with_cache(cache))
    live = [PolicyRange(*part) for part in cache.places.live]
    protection = Protection(sink_cells=16, window_cells=32)
    chosen = select(
        policy, live, 240, engine.evidence(cache.id, 0), cells=96, protection=protection, block_cells=16
    )
    assert 96 <= sum(part.cells for part in chosen) <= 112
    result = engine.apply(
        Plan(steps=(Step(verb=Verb.MASK, cache=cache.id, ranges=tuple(Range(*p) for p in chosen)),))
    )
    assert result.masked == sum(part.cells for part in chosen)


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

    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
        max_position_embeddings=512,
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


def test_attention_is_of_what_still_stands_when_tokens_were_cropped(engine, place):
    """As look-up decoding does at every step: queries of tokens that are gone say nothing."""
    model = tiny_model("eager")
    caches = [filled(model, place, prompt(60)) for _ in range(2)]
    for cache in caches:
        engine.add(cache)
    engine.collect(frozenset({"attention"}))
    late = prompt(40, seed=5)
    for cache in caches:
        model(late, **with_cache(cache))
    model(prompt(7, seed=6), **with_cache(caches[1]))
    caches[1].crop(-7)
    found = [engine.evidence(cache.id, 0).attention(Range(0, 100)) for cache in caches]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    caches[1].take_out([Range(70, 80)], keep=True)  # queries before a hole saw what is no longer there
    known = engine.evidence(caches[1].id, 0)
    assert known.why_not("attention") == ""
    assert np.isnan(known.attention(Range(70, 80))).all()
    assert np.isfinite(known.attention(Range(80, 100))).all()
    caches[1].crop(-20)
    assert np.isnan(engine.evidence(caches[1].id, 0).attention(Range(0, 70))).all()
