"""The rung without a new cache: a stock cache's end is parked by its public methods, and put back."""

import pytest
import torch
from tiny import prompt, tiny_model, with_cache

from psi_kv_governor.engines.transformers.stock import ParkedEnd
from psi_kv_governor.errors import BadInputError, EngineError
from transformers import DynamicCache, QuantizedCache  # noqa: F401


@pytest.fixture
def model():
    return tiny_model()


def stock(model, tokens: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(prompt(tokens), **with_cache(cache))
    return cache


def states(cache) -> list[torch.Tensor]:
    return [it.clone() for layer in cache.layers for it in (layer.keys, layer.values)]


@pytest.mark.parametrize("cells", [1, 300, 500])
def test_the_end_of_a_stock_cache_leaves_and_comes_back_bit_for_bit(model, place, cells):
    cache = stock(model, 500)
    before = states(cache)
    parked = ParkedEnd(cache, cells, place)
    assert cache.get_seq_length() == 500 - cells
    size = before[0].numel() * before[0].element_size() // 500
    for layer in cache.layers:
        assert layer.keys.untyped_storage().nbytes() == (500 - cells) * size  # no view of the whole
    if cells > 100:
        assert parked.bytes_parked >= 0.9 * 6 * cells * size
    parked.put_back()
    for was, now in zip(before, states(cache), strict=True):
        assert torch.equal(was, now)
    assert cache.get_seq_length() == 500
    parked.put_back()


def test_what_was_used_meanwhile_is_not_put_back(model, place):
    cache = stock(model, 50)
    parked = ParkedEnd(cache, 20, place)
    model(prompt(3), **with_cache(cache))
    with pytest.raises(BadInputError, match="used while"):
        parked.put_back()
    assert cache.get_seq_length() == 33


def test_a_full_place_leaves_a_stock_cache_as_it_was(model, place):
    import msgspec

    cache = stock(model, 500)
    before = states(cache)
    tight = msgspec.structs.replace(place, limit_bytes=1 << 17)
    with pytest.raises(EngineError, match="stays as it was"):
        ParkedEnd(cache, 500, tight)
    for was, now in zip(before, states(cache), strict=True):
        assert torch.equal(was, now)


@pytest.mark.parametrize("cells", [0, 51])
def test_more_than_there_is_cant_be_parked(model, place, cells):
    with pytest.raises(BadInputError, match=f"no {cells} positions"):
        ParkedEnd(stock(model, 50), cells, place)
