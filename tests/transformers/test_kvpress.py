"""Presses of kvpress as policies, and policies as presses of kvpress. Needs kvpress 0.5.5."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from tiny import filled, prompt, tiny_model, with_cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from psi_kv_governor.engines.transformers.cache import GovernedCache
from psi_kv_governor.engines.transformers.engine import TransformersEngine
from psi_kv_governor.engines.transformers.kvpress import (
    WORKING,
    KvpressPolicy,
    as_press,
    load_press,
    press_scores,
)
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.policy import get_policy
from psi_kv_governor.policy.base import Range
from psi_kv_governor.policy.select import Protection, select
from transformers import DynamicCache

if importlib.util.find_spec("kvpress") is None:
    pytest.skip("kvpress is not installed", allow_module_level=True)

NOT_WORKING = {
    "CompactorPress": "only supports prefill",
    "LeverageScorePress": "only supports prefill",
    "NonCausalAttnPress": "only supports prefill",
    "ObservedAttentionPress": "eager",  # the attention weights of the whole prompt
    "QFilterPress": "not loaded",  # its filters come from a hub
    "FinchPress": "can't score",  # it is told where the question begins
    "KVzapPress": "can't score",  # a trained model of its own
    "KVzipPress": "gives no scores",  # several passes over the prompt
    "ThinKPress": "gives no scores",  # it prunes dimensions
    "NoSuchPress": "no press called",
}


@pytest.fixture
def watched(place):
    """A cache of 240 tokens, decoded so that late hidden states are known."""
    model = tiny_model()
    engine = TransformersEngine(place)
    cache = filled(model, place, prompt(160))
    engine.add(cache)
    evidence = engine.evidence(cache.id, 0)
    press_scores(load_press("KnormPress"), evidence)  # asks for hidden states from now on
    model(prompt(80, seed=3), **with_cache(cache))
    return model, cache, evidence


@pytest.mark.parametrize("name", WORKING)
def test_a_press_scores_every_position_by_score_alone(watched, name):
    _, cache, evidence = watched
    scores = press_scores(load_press(name), evidence)
    assert scores.shape == (240,)
    assert np.isfinite(scores).all()
    assert 0 <= scores.min() < scores.max() <= 1
    cache.take_out([Range(50, 90)], keep=True)
    scores = press_scores(load_press(name), evidence)
    assert np.isnan(scores[50:90]).all()
    assert np.isfinite(scores[:50]).all()


@pytest.mark.parametrize("name", WORKING)
def test_a_press_as_a_policy_chooses_what_to_drop(watched, name):
    _, cache, evidence = watched
    protection = Protection(sink_cells=16, window_cells=64)
    live = [Range(0, 240)]
    chosen = select(KvpressPolicy(name), live, 240, evidence, cells=64, protection=protection, block_cells=16)
    assert 64 <= sum(part.cells for part in chosen) <= 80
    assert cache.take_out(chosen, keep=True)[1] == ""


def test_the_ranks_of_a_press_are_those_of_its_own_scores(watched):
    _, cache, evidence = watched
    norms = -torch.stack(
        [torch.linalg.vector_norm(layer.keys, dim=-1)[0] for layer in cache.layers]
    )  # as KnormPress has it
    ranks = norms.argsort(dim=-1, stable=True).argsort(dim=-1).double().mean((0, 1)) / 239
    np.testing.assert_allclose(press_scores(load_press("KnormPress"), evidence), ranks.numpy())


def test_loading_a_press_patches_nothing():
    before = dict(ALL_ATTENTION_FUNCTIONS._global_mapping)
    loaded = "kvpress" in sys.modules
    load_press("SnapKVPress")
    assert dict(ALL_ATTENTION_FUNCTIONS._global_mapping) == before
    assert ("kvpress" in sys.modules) == loaded


@pytest.mark.parametrize(("name", "why"), NOT_WORKING.items())
def test_a_press_that_cant_be_used_is_refused_in_one_line(watched, name, why):
    _, _, evidence = watched
    with pytest.raises(BadInputError, match=why) as caught:
        press_scores(load_press(name), evidence)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["window", "keynorm", "keydiff", "attention", "lru", "hybrid", "random"])
def test_our_policies_score_as_presses(name):
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    seen = []

    def score(module, args, kwargs, output):
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        layer = cache.layers[module.layer_idx]
        press = as_press(get_policy(name), 0.5, sinks=8, window=16, block=8)
        seen.append(press.score(module, hidden, layer.keys, layer.values, None, kwargs))

    hooks = [layer.self_attn.register_forward_hook(score, with_kwargs=True) for layer in model.model.layers]
    model(prompt(96), **with_cache(cache))
    for hook in hooks:
        hook.remove()
    assert len(seen) == 3
    for scores in seen:
        assert scores.shape == (1, 2, 96)
        assert scores.isfinite().all()
        kept = scores[0, 0].topk(48).indices
        assert set(range(8)) <= set(kept.tolist())
        assert set(range(80, 96)) <= set(kept.tolist())


def test_our_policy_runs_as_a_press_of_kvpress_itself():
    """With kvpress' own hooks, which need transformers before 5.3."""
    import transformers

    if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 3):
        pytest.skip("kvpress 0.5.5 wants transformers before 5.3: run in the oldest environment")
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    press = as_press(get_policy("keydiff"), 0.5, sinks=8, window=16, block=8)
    with press(model):
        model(prompt(96), **with_cache(cache))
    assert {layer.keys.shape[-2] for layer in cache.layers} == {48}
    assert isinstance(GovernedCache(model), GovernedCache)
