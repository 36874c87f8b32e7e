"""What can't be governed is refused in one line, and changes nothing."""

import copy

import pytest
import torch
from tiny import filled, next_logits, prompt, tiny_config, tiny_model, with_cache

from psi_kv_governor.engines.transformers import versions
from psi_kv_governor.engines.transformers.cache import GovernedCache
from psi_kv_governor.engines.transformers.front import governed
from psi_kv_governor.errors import BadInputError


@pytest.fixture
def model():
    return tiny_model()


def refused(action) -> str:
    with pytest.raises(BadInputError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_cache_used_by_two_models(model, place):
    cache = filled(model, place, prompt(20))
    expected = next_logits(model, cache, prompt(3))
    for other in (tiny_model(seed=5), tiny_model(config=tiny_config(num_key_value_heads=4))):
        assert "another model" in refused(lambda other=other: other(prompt(3), **with_cache(cache)))
    assert torch.equal(next_logits(model, cache, prompt(3)), expected)


def test_two_models_with_caches_of_their_own_that_are_mixed_up(model, place):
    other = tiny_model(seed=5)
    cache, theirs = filled(model, place, prompt(20)), filled(other, place, prompt(20))
    assert "another model" in refused(lambda: other(prompt(3), **with_cache(cache)))
    assert "another model" in refused(lambda: model(prompt(3), **with_cache(theirs)))


def test_a_model_that_changed_its_type_or_batch_meanwhile(model, place):
    cache = filled(model, place, prompt(20))
    expected = next_logits(model, cache, prompt(3))
    assert "one GovernedCache is for one model and batch" in refused(
        lambda: model(prompt(3, batch=2), **with_cache(cache))
    )
    model.to(torch.float64)
    assert "float64" in refused(lambda: model(prompt(3), **with_cache(cache)))
    model.to(torch.float32)
    assert torch.equal(next_logits(model, cache, prompt(3)), expected)


def test_a_model_that_moved_to_a_device_meanwhile(model, place):
    cache = filled(model, place, prompt(20))
    expected = next_logits(model, cache, prompt(3))
    states = torch.empty(1, 2, 3, 16, device="meta")  # a device of torch's that needs no hardware
    cache.begin_forward()
    assert "moved to meta" in refused(lambda: cache.update(states, states, 0))
    cache.end_forward()
    assert torch.equal(next_logits(model, cache, prompt(3)), expected)


def test_a_model_on_a_device_altogether(model, place):
    model.to("meta")
    assert "is on meta" in refused(lambda: GovernedCache(model, place=place))


def test_a_model_with_nothing_but_sliding_windows(place):
    from transformers import MistralConfig

    config = tiny_config(MistralConfig, num_hidden_layers=2, sliding_window=32)
    assert "DynamicSlidingWindowLayer" in refused(
        lambda: GovernedCache(tiny_model(config=config), place=place)
    )


def test_training_through_a_governed_cache(model, place):
    cache = GovernedCache(model, place=place)
    with torch.enable_grad():
        assert "torch.no_grad()" in refused(lambda: model(prompt(3), **with_cache(cache)))
    assert cache.get_seq_length() == 0


def test_a_copy_of_a_cache(model, place):
    cache = filled(model, place, prompt(5))
    assert "can't be copied" in refused(lambda: copy.deepcopy(cache))


@pytest.mark.parametrize("version", ["4.57.6", "5.1.0", "6.0.0", "what"])
def test_versions_out_of_range(monkeypatch, version):
    import transformers

    monkeypatch.setattr(transformers, "__version__", version)
    assert f"transformers {version} is not one of" in refused(versions.check_versions)


def test_a_model_that_is_governed_already(model):
    engine = governed(model)
    assert "already" in refused(lambda: governed(model))
    engine.close()
    governed(model).close()
