"""Recall on the real demo model: what was taken out comes back for a question, and nothing else changes."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from tiny import COUNT, RECALL_AHEAD, filled, prompt, wide_model, with_cache

from psi_kv_governor.cache import Plan, Range, Recall, Recalled, Step, Verb
from psi_kv_governor.engines.transformers import exchange
from psi_kv_governor.engines.transformers.cache import GovernedCache
from psi_kv_governor.engines.transformers.engine import TransformersEngine
from psi_kv_governor.native.compiling import SOURCE_DIR

TEXT = (
    "The museum opens at nine and closes at five. Visitors walk through the halls and look at the paintings. "
    "In the garden the trees stand in long rows, and the gardener waters them in the evening. "
)
FACT = "\n\nThe treasure is buried under the fountain.\n\n"
QUESTION = "\n\nThe treasure is buried under the"


pytestmark = pytest.mark.usefixtures("native_part")


@pytest.fixture(scope="session")
def tokenizer(demo_gguf):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(**demo_gguf)


class Story:
    """A text with a fact in it, of which three quarters were given up, the fact among them."""

    def __init__(self, model, tokenizer, place) -> None:
        def tokens(text: str) -> torch.Tensor:
            return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids

        self.model, self.tokenizer = model, tokenizer
        self.text, self.question = tokens(TEXT + FACT + TEXT * 5), tokens(QUESTION)
        first = tokens(TEXT).shape[1]
        self.fact = Range(first, first + tokens(FACT).shape[1])
        self.gone = Range(32, self.text.shape[1] - 96)
        assert self.gone.start < self.fact.start
        assert self.fact.stop < self.gone.stop
        self.engine = TransformersEngine(place)
        self.cache = GovernedCache(model, place=place)
        model(self.text, **with_cache(self.cache))
        self.engine.add(self.cache)

    def read(self, **settings) -> tuple[Recalled, torch.Tensor]:
        """From the whole text: give up, ask. What recall did, and the logits after the question."""
        self.whole()
        self.engine.recall(Recall(**{**RECALL_AHEAD, **settings}))
        before = self.engine.recalled()
        mask = Step(verb=Verb.MASK, cache=self.cache.id, ranges=(self.gone,))
        assert self.engine.apply(Plan(steps=(mask,))).problem == ""
        logits = self.model(self.question, **with_cache(self.cache)).logits[0, -1]
        return since(self.engine, before), logits

    def whole(self) -> None:
        """The text and no more, all of it live."""
        self.engine.apply(Plan(steps=(Step(verb=Verb.UNMASK, cache=self.cache.id),)))
        if extra := self.cache.get_seq_length() - self.text.shape[1]:
            self.cache.crop(-extra)

    def said(self, logits: torch.Tensor) -> str:
        return str(self.tokenizer.decode([int(logits.argmax())]))


def since(engine, before: Recalled) -> Recalled:
    now = engine.recalled()
    names = ("read_bytes", "blocks", "exchanges", "decoded_again")
    return Recalled(**{name: getattr(now, name) - getattr(before, name) for name in names})


@pytest.fixture(scope="session")
def demo_story(demo, tokenizer, place):
    torch.set_num_threads(1)
    with torch.no_grad():
        story = Story(demo, tokenizer, place)
    yield story
    story.engine.close()


@pytest.fixture(params=[pytest.param("demo", marks=pytest.mark.slow)])  # all tests of it: its file takes long
def story(demo_story):
    yield demo_story
    demo_story.engine.recall(Recall())
    demo_story.whole()


def test_a_fact_that_was_given_up_comes_back_for_its_question(story):
    told, logits = story.read(mode="off")
    assert told == Recalled()
    assert "fountain" not in story.said(logits)
    told, logits = story.read()
    assert "fountain" in story.said(logits)
    assert told.decoded_again == 1
    assert 0 < told.read_bytes <= story.gone.cells * story.cache.cell_bytes
    wanted = story.engine.evidence(story.cache.id, 0).demand(story.fact)  # to a policy it is one more score
    assert np.nanmax(wanted) >= exchange.LEAST_SHARE
    story.whole()
    story.model(story.question, **with_cache(story.cache))
    wanted = story.engine.evidence(story.cache.id, 0).demand(story.fact)
    assert np.isnan(wanted).all()  # and nothing to the next pressure


def test_as_many_positions_are_live_as_before_and_a_summary_is_small(story):
    told, _ = story.read()
    places = story.cache.places
    length = story.text.shape[1] + story.question.shape[1]
    assert told.blocks > 0
    assert places.next_position == length
    assert places.live_cells == length - story.gone.cells
    assert (
        Range(0, RECALL_AHEAD["sink_cells"]) == Range(0, places.masked[0].start)
        or places.masked[0].start > 32
    )
    assert places.masked[-1].stop <= length - RECALL_AHEAD["window_cells"]
    assert 0 < story.engine.recalled().summary_bytes <= 0.02 * story.cache.cell_bytes


def test_what_was_exchanged_comes_back_bit_for_bit(story):
    story.engine.recall(Recall())
    whole = story.model(story.question, **with_cache(story.cache)).logits
    told, _ = story.read()
    assert told.blocks > 0
    story.whole()
    again = story.model(story.question, **with_cache(story.cache)).logits
    assert torch.equal(again, whole)
    assert story.cache.asides.files == []


def test_nothing_is_done_while_nothing_is_parked(story):
    story.engine.recall(Recall())
    whole = story.model(story.question, **with_cache(story.cache)).logits
    story.whole()
    story.engine.recall(Recall(**RECALL_AHEAD))
    before = story.engine.recalled()
    assert torch.equal(story.model(story.question, **with_cache(story.cache)).logits, whole)
    assert since(story.engine, before) == Recalled()
    assert story.engine.recalled().why_not == ""
    assert story.cache.asides.files == []


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"paused": True}, id="memory is short"),
        pytest.param({"bytes_per_s": 1.0}, id="nothing may be read"),
        pytest.param({"marked": (Range(300, 10_000),), "window_cells": 96}, id="everything live must stay"),
    ],
)
def test_nothing_comes_in_when_it_may_not(story, settings):
    told, logits = story.read(**settings)
    assert told == Recalled()
    assert "fountain" not in story.said(logits)


def test_following_exchanges_blocks_and_does_no_pass_twice(story):
    told, _ = story.read(mode="follow")
    assert told.blocks > 0
    assert told.decoded_again == 0


def test_one_token_in_eight_is_observed_and_what_it_wants_comes(story):
    story.read(mode="follow", paused=True)
    before = story.engine.recalled()
    story.engine.recall(Recall(**{**RECALL_AHEAD, "mode": "follow"}))
    looks = story.cache.recaller.demand.observed
    for token in story.question.repeat(1, 16)[0, -16:]:  # so that one that is observed ends the question
        story.model(token.reshape(1, 1), **with_cache(story.cache))
    assert story.cache.recaller.demand.observed == looks + 2
    assert since(story.engine, before).blocks > 0


def test_drafts_that_are_taken_back_are_no_question(story):
    story.read(mode="off")
    story.engine.recall(Recall(**{**RECALL_AHEAD, "paused": True}))
    mask = Step(verb=Verb.MASK, cache=story.cache.id, ranges=(story.gone,))
    story.whole()
    story.engine.apply(Plan(steps=(mask,)))
    drafts = story.question[:, :6]
    story.model(drafts, **with_cache(story.cache))
    story.cache.crop(-3)
    story.engine.recall(Recall(**RECALL_AHEAD))
    before = story.engine.recalled()
    story.model(drafts, **with_cache(story.cache))
    assert since(story.engine, before).decoded_again == 0


@pytest.fixture
def anything_goes(monkeypatch):
    """A model of chance looks at everything alike: whatever is looked at a little more is wanted."""
    monkeypatch.setattr(exchange, "LEAST_SHARE", 0.0)
    monkeypatch.setattr(exchange, "TIMES_BETTER", 1.0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [1, 3])
def test_whatever_is_exchanged_while_decoding_rows_are_as_written(place, attention, batch, anything_goes):
    """However often: after everything is back, keys and values are what they were."""
    model = wide_model()
    model.set_attn_implementation(attention)
    cache, engine = filled(model, place, prompt(300, batch)), TransformersEngine(place)
    engine.add(cache)
    rows = [keys_and_values(layer, 300) for layer in cache.layers]
    engine.recall(Recall(mode="ahead", sink_cells=16, window_cells=32, bytes_per_s=1e9))
    engine.apply(Plan(steps=(Step(verb=Verb.MASK, cache=cache.id, ranges=(Range(20, 240),)),)))
    for turn in range(6):
        model(prompt(20, batch, seed=turn), **with_cache(cache))
        for token in prompt(9, batch, seed=50 + turn).T:
            model(token[:, None], **with_cache(cache))
    told = engine.recalled()
    assert told.why_not == ""
    assert told.decoded_again > 0
    engine.recall(Recall())
    engine.apply(Plan(steps=(Step(verb=Verb.UNMASK, cache=cache.id),)))
    for layer, before in zip(cache.layers, rows, strict=True):
        for now, then in zip(keys_and_values(layer, 300), before, strict=True):
            assert torch.equal(now, then)
    engine.close()


def keys_and_values(layer, cells: int) -> list[torch.Tensor]:
    return [rows[:, :, :cells].clone() for rows in (layer.keys, layer.values)]


def test_beams_change_places_and_recall_goes_on(place, anything_goes):
    model = wide_model()
    cache, engine = filled(model, place, prompt(200).repeat(3, 1)), TransformersEngine(place)
    engine.add(cache)
    engine.recall(Recall(mode="follow", sink_cells=16, window_cells=32, bytes_per_s=1e9))
    engine.apply(Plan(steps=(Step(verb=Verb.MASK, cache=cache.id, ranges=(Range(20, 140),)),)))
    ids = torch.cat([prompt(200), prompt(10, seed=8)], dim=1)
    model.generate(ids, attention_mask=torch.ones_like(ids), **{**COUNT, "num_beams": 3}, **with_cache(cache))
    assert engine.recalled().why_not == ""
    assert engine.recalled().blocks > 0
    engine.close()


def test_the_numbers_are_those_of_the_agent():
    sources = "".join((SOURCE_DIR / name).read_text() for name in ("recall.h", "recall.c", "exchange.c"))
    for name in ("BLOCK_CELLS", "REST", "LEFT", "TIMES_BETTER", "LEAST_SHARE", "LAYER_DEPTH"):
        found = re.search(rf"#define {name}\s+([\d.]+)", sources)
        assert found is not None, name
        assert float(found[1]) == getattr(exchange, name), name
