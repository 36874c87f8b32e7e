"""Where recall can't be had: it is off with its reason, and everything else works."""

from __future__ import annotations

import pytest
from tiny import RECALL_AHEAD, VOCABULARY, filled, prompt, tiny_model, wide_model, with_cache

from psi_kv_governor.cache import Plan, Range, Recall, Step, Verb
from psi_kv_governor.engines.transformers.engine import TransformersEngine

pytestmark = pytest.mark.usefixtures("native_part")


def test_summaries_too_large_are_said_and_everything_else_works(place):
    model = tiny_model()  # of three layers, so that one layer's summaries are 4 % of a cell
    cache, engine = filled(model, place, prompt(200)), TransformersEngine(place)
    engine.add(cache)
    engine.recall(Recall(**RECALL_AHEAD))
    mask = Step(verb=Verb.MASK, cache=cache.id, ranges=(Range(40, 100),))
    assert engine.apply(Plan(steps=(mask,))).masked == 60
    model(prompt(5), **with_cache(cache))
    assert "more than 2 %" in engine.recalled().why_not
    assert cache.places.masked == (Range(40, 100),)
    assert engine.recalled().blocks == 0
    engine.close()


def test_attention_that_cant_be_made_again_is_said(place):
    from transformers import GPTNeoXConfig

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = tiny_model(config=GPTNeoXConfig(vocab_size=VOCABULARY, **sizes))
    engine = TransformersEngine(place)
    engine.add(filled(model, place, prompt(40)))
    engine.recall(Recall(**RECALL_AHEAD))
    kept = engine._all()
    assert kept == []  # it is nobody's any more
    cache = filled(model, place, prompt(40))
    engine.add(cache)
    assert "no projections that can be repeated" in engine.recalled().why_not
    engine.close()


def test_a_machine_without_a_place_to_park_says_so():
    engine = TransformersEngine(None, "a tmpfs everywhere")
    cache = filled(tiny_model(), None, prompt(40))
    engine.add(cache)
    engine.recall(Recall(**RECALL_AHEAD))
    assert engine.recalled().why_not == "a tmpfs everywhere"


def test_without_a_native_part_it_is_off_with_the_reason(place, monkeypatch):
    def refuse():
        raise RuntimeError("no C compiler found")

    monkeypatch.setattr("psi_kv_governor.engines.transformers.ledger.prepare", refuse)
    model = wide_model()
    cache, engine = filled(model, place, prompt(200)), TransformersEngine(place)
    engine.add(cache)
    engine.recall(Recall(**RECALL_AHEAD))
    engine.apply(Plan(steps=(Step(verb=Verb.MASK, cache=cache.id, ranges=(Range(40, 100),)),)))
    model(prompt(5), **with_cache(cache))
    assert engine.recalled().why_not == "no C compiler found"
    engine.close()
