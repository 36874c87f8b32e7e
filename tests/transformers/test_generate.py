"""In every mode of generate the tokens are those of a stock cache, whatever is parked meanwhile."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny import COUNT, prompt, tiny_model, with_cache

from psi_kv_governor.cache import Plan, Range, Step, Verb
from psi_kv_governor.engines.transformers.cache import GovernedCache
from psi_kv_governor.engines.transformers.engine import TransformersEngine
from psi_kv_governor.engines.transformers.versions import cache_argument
from transformers import DynamicCache
from waiting import PATIENCE_S, until

VERBS = (Verb.PARK, Verb.WRITE_BEHIND, Verb.UNPARK, Verb.RELEASE)


@contextmanager
def meddled(model, cache: GovernedCache, place) -> Iterator[None]:
    """A governor's thread that parks, writes behind and brings back all the time."""
    engine = TransformersEngine(place)
    engine.add(cache)
    over, problems, passes, rounds = threading.Event(), [], [0], [0]

    def meddle() -> None:
        while not over.wait(0.002):  # a token takes as long: without a pause both wait for each other
            verb = VERBS[rounds[0] % len(VERBS)]
            result = engine.apply(Plan(steps=(Step(verb=verb, cache=cache.id),)))
            problems.extend(filter(None, [result.problem]))
            with cache.at_rest(PATIENCE_S) as still:  # out and back between two tokens: nobody may notice
                if still and cache.places.next_position > 20:
                    cache.take_out([Range(3, 9), Range(12, cache.places.next_position - 2)], keep=True)
                    cache.put_back(cache.places.masked)
            rounds[0] += 1

    def begun(*_: object) -> None:
        """Before a pass: drafts make it few of them, and a busy machine may leave the thread out of all."""
        passes[0] += 1
        wanted = min(len(VERBS) * (passes[0] - 1), 3 * len(VERBS))  # before the first, nothing is there
        until(lambda: rounds[0] >= wanted or problems, f"no {wanted} rounds were made")

    def watched() -> None:
        try:
            meddle()
        except Exception as error:
            problems.append(repr(error))

    thread = threading.Thread(target=watched)
    hook = model.register_forward_pre_hook(begun)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        hook.remove()
    assert problems == []
    assert rounds[0] >= len(VERBS)


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    return tiny_model(request.param)


@pytest.fixture(params=["memory", "file"])
def cache(request, model, place) -> Iterator[GovernedCache]:
    made = GovernedCache(model, place=place, backing=request.param, max_cells=512)
    yield made
    made.close()


def padded() -> dict:
    ids, mask = prompt(40, batch=3), torch.ones(3, 40, dtype=torch.long)
    for member, pads in enumerate((0, 11, 25)):
        ids[member, :pads], mask[member, :pads] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def plain() -> dict:
    return {"input_ids": prompt(40), "attention_mask": torch.ones(1, 40, dtype=torch.long)}


MODES = {
    "plain": plain,
    "padded batch": padded,
    "beams": lambda: {**plain(), "num_beams": 4},
    "beams of a padded batch": lambda: {**padded(), "num_beams": 3, "num_return_sequences": 2},
    "prompt look-up": lambda: {
        "input_ids": prompt(10).repeat(1, 4),
        "attention_mask": torch.ones(1, 40, dtype=torch.long),
        "prompt_lookup_num_tokens": 4,
    },
    "assistant": lambda: {**plain(), "assistant_model": tiny_model(seed=2)},
    "an assistant that is right": lambda: {**plain(), "assistant_model": tiny_model(seed=1)},
    "chunked prefill": lambda: {**plain(), "prefill_chunk_size": 16},
    "sampling": lambda: {**plain(), "do_sample": True, "top_k": 5},
}


@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_a_stock_cache(model, cache, place, mode):
    options = {**COUNT, **MODES[mode]()}
    torch.manual_seed(3)
    expected = model.generate(**options, **{cache_argument(): DynamicCache(config=model.config)})
    torch.manual_seed(3)
    with meddled(model, cache, place):
        got = model.generate(**options, **with_cache(cache))
    assert torch.equal(got, expected)
    assert cache.places.next_position == got.shape[1] - 1 or "assist" in mode or "look-up" in mode


def test_a_conversation_goes_on_from_its_cache(model, cache, place):
    first = plain()
    stock = DynamicCache(config=model.config)
    expected = model.generate(**COUNT, **first, **{cache_argument(): stock})
    more = torch.cat([expected, prompt(9, seed=8)], dim=1)
    mask = {"attention_mask": torch.ones_like(more)}
    expected = model.generate(more, **COUNT, **mask, **{cache_argument(): stock})
    with meddled(model, cache, place):
        model.generate(**COUNT, **first, **with_cache(cache))
        assert torch.equal(model.generate(more, **COUNT, **mask, **with_cache(cache)), expected)


def test_a_cache_that_was_reset_begins_anew(model, cache):
    expected = model.generate(**COUNT, **plain())
    for _ in range(2):
        assert torch.equal(model.generate(**COUNT, **plain(), **with_cache(cache)), expected)
        cache.reset()
        assert cache.get_seq_length() == 0


def test_crop_in_a_stock_way_leaves_the_common_beginning(model, cache):
    expected = model.generate(**COUNT, **plain())
    model.generate(
        **COUNT,
        **{
            **plain(),
            "input_ids": torch.cat([prompt(40), prompt(9)], 1),
            "attention_mask": torch.ones(1, 49, dtype=torch.long),
        },
        **with_cache(cache),
    )
    cache.crop(-(cache.get_seq_length() - 39))
    assert torch.equal(model.generate(**COUNT, **plain(), **with_cache(cache)), expected)


@pytest.mark.parametrize("change", ["repeat", "select"])
def test_the_batch_can_be_repeated_and_selected(model, cache, change):
    ids = prompt(30, batch=3)
    stock = DynamicCache(config=model.config)
    for it in (cache, stock):
        model(ids, **{cache_argument(): it})
        if change == "repeat":
            it.batch_repeat_interleave(2)
        else:
            it.batch_select_indices(torch.tensor([2, 0]))
    for ours, theirs in zip(cache.layers, stock.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
