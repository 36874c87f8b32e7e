"""Whatever is decoded, masked, brought back, cropped and reordered in whatever order: rows are as written."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config, tiny_model

from psi_kv_governor.cache import Range
from psi_kv_governor.engines.transformers import aside
from psi_kv_governor.engines.transformers.cache import GovernedCache

BATCH, LAYERS, WIDTH = 3, 2, 8
STEP = st.one_of(
    st.tuples(st.just("decode"), st.integers(1, 20)),
    st.tuples(st.just("mask"), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=3)),
    st.tuples(st.just("unmask"), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=3)),
    st.tuples(st.just("crop"), st.integers(0, 12)),
    st.tuples(st.just("reorder"), st.lists(st.integers(0, BATCH - 1), min_size=BATCH, max_size=BATCH)),
    st.tuples(st.just("park"), st.none()),
)


@settings(max_examples=60)
@given(
    backing=st.sampled_from(["memory", "file"]),
    most=st.sampled_from([1, 64]),
    steps=st.lists(STEP, max_size=14),
)
def test_a_cache_is_its_rows(place, backing, most, steps):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aside, "MOST_FILES", most)  # with one, they are joined at every turn
        check(place, backing, steps)


def check(place, backing, steps):
    config = tiny_config(
        num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=2, head_dim=WIDTH
    )
    cache = GovernedCache(tiny_model(config=config), place=place, backing=backing, max_cells=16)
    whole = [torch.empty(BATCH, 2, 0, WIDTH) for _ in range(2 * LAYERS)]  # as a stock cache would hold it
    for verb, given_ in steps:
        if verb == "decode":
            cache.begin_forward()
            for layer in range(LAYERS):
                new = [torch.randn(BATCH, 2, given_, WIDTH) for _ in range(2)]
                cache.update(*new, layer)
                for i in range(2):
                    whole[2 * layer + i] = torch.cat([whole[2 * layer + i], new[i]], dim=2)
            cache.end_forward()
        elif verb == "mask":
            assert cache.take_out([Range(*sorted(pair)) for pair in given_], keep=True)[1] == ""
        elif verb == "unmask":
            cache.put_back([Range(*sorted(pair)) for pair in given_])
        elif verb == "crop" and given_ <= cache.get_seq_length():
            cache.crop(-given_)
            whole = [it[:, :, : it.shape[2] - given_] for it in whole]
        elif verb == "reorder" and cache.tensors:
            cache.reorder_cache(torch.tensor(given_))
            whole = [it[given_] for it in whole]
        elif verb == "park":
            for rows in cache.tensors:
                assert rows.mapping.park(rows.parts()).problem == ""
        live = cache.places.live_positions()
        for rows, expected in zip(cache.tensors, whole, strict=False):
            assert torch.equal(rows.view(cache.places.live_cells), expected[:, :, live])
    cache.put_back(cache.places.masked)
    for rows, expected in zip(cache.tensors, whole, strict=False):
        assert torch.equal(rows.view(cache.places.live_cells), expected)
    cache.close()
