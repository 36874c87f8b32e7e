"""The evidence that policies choose on: keys, and what the model itself attends to."""

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, filled, prompt, tiny_config, tiny_model, with_cache

from psi_kv_governor.cache import Plan, Range, Step, Verb
from psi_kv_governor.policy import get_policy


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


def capped_config():
    """A scale and a cap of its own, such that neither can be left out."""
    from transformers import Gemma2Config

    return tiny_config(
        Gemma2Config,
        head_dim=16,
        query_pre_attn_scalar=1,
        attn_logit_softcapping=0.5,
        layer_types=["full_attention"] * 3,
    )


@pytest.mark.parametrize("config", [None, capped_config], ids=["Llama", "Gemma 2"])
def test_attention_is_what_the_model_itself_attends_to(engine, place, config):
    """Against the attention weights that eager attention gives out."""
    model = tiny_model("eager", config=config and config())
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
