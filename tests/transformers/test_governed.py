"""`governed(model)`: every generate uses a cache of ours, and nothing else changes."""

import gc

import torch
from tiny import COUNT, prompt, tiny_model, with_cache

from psi_kv_governor.cache import Plan, Step, Verb
from psi_kv_governor.engines.transformers.cache import GovernedCache
from psi_kv_governor.engines.transformers.front import governed
from psi_kv_governor.engines.transformers.versions import cache_argument
from transformers import DynamicCache, GenerationConfig


def test_every_generate_is_governed_and_gives_the_same(place):
    model = tiny_model()
    ids = {"input_ids": prompt(30), "attention_mask": torch.ones(1, 30, dtype=torch.long)}
    expected = model.generate(**ids, **COUNT)
    engine = governed(model, store_dir=place.folder.rpartition("/")[0])
    output = model.generate(**ids, **COUNT, return_dict_in_generate=True)
    cache = output[cache_argument()]
    assert isinstance(cache, GovernedCache)
    assert torch.equal(output.sequences, expected)
    assert [state.id for state in engine.snapshot().caches] == [cache.id]
    result = engine.apply(Plan(steps=(Step(verb=Verb.PARK, cache=cache.id),)))
    assert result.bytes_returned > 0
    assert engine.describe().place == place.folder
    assert engine.describe().details["backing"]
    del output, cache
    gc.collect()
    assert engine.snapshot().caches == ()
    engine.close()
    output = model.generate(**ids, **COUNT, return_dict_in_generate=True)
    assert type(output[cache_argument()]) is DynamicCache


def test_caches_of_the_callers_choice_are_left_alone():
    model = tiny_model()
    engine = governed(model)
    ids = {"input_ids": prompt(30), "attention_mask": torch.ones(1, 30, dtype=torch.long)}
    own = DynamicCache(config=model.config)
    model.generate(**ids, **COUNT, **with_cache(own))
    assert own.get_seq_length() == 53
    model.generate(**ids, **COUNT, use_cache=False)
    model.generate(**ids, **COUNT, cache_implementation="static")
    settings = GenerationConfig(**COUNT, use_cache=False)
    model.generate(**ids, generation_config=settings)
    gc.collect()
    assert engine.snapshot().caches == ()
    engine.close()
