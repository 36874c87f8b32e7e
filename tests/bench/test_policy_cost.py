"""A small real run of the benchmark of policies: scores and samples against decoded tokens."""

from __future__ import annotations

import math

import pytest
from psi_kv_governor.bench import policy_cost
from psi_kv_governor.bench.record import Options

pytestmark = pytest.mark.llama

PLAN = policy_cost.Plan(contexts=(("q8_0", 96),), pairs=2, tokens=9, score_repeats=2)


def test_every_figure_is_taken_and_held_against_what_is_asked(demo_model):
    said: list[str] = []
    figures = {
        found.name: found
        for found in policy_cost.measure(Options(model=demo_model), PLAN, threads=1, say=said.append)
    }
    asked = {name: found.asked for name, found in figures.items() if found.asked}
    assert asked == {
        "scoring by keynorm over a token": policy_cost.KEY_SCORES,
        "scoring by keydiff over a token": policy_cost.KEY_SCORES,
        "sampled over unsampled speed": policy_cost.SAMPLING,
    }
    assert all(len(found.values) == 2 for found in figures.values())
    assert all(math.isfinite(value) and value > 0.0 for found in figures.values() for value in found.values)
    assert {found.case for found in figures.values()} == {"q8_0, 96 tokens"}
    assert said[-1] == "q8_0, 96 tokens: sampling, pair 2 of 2"


def test_sampling_is_off_in_every_second_turn_and_decoding_leaves_no_trace(demo_model):
    from psi_kv_governor.engine.llama.sampler import Sampling

    with policy_cost._Context(demo_model, "f16", 64, 1, lambda doing: None) as context:
        context.evidence.collect(frozenset({"attention"}), Sampling(near=0))  # the context is short
        sampler, ledger = context.evidence._sampler, context._llm._engine.ledger
        sampler.forget()
        for paused, known in ((True, False), (False, True)):
            sampler.pause(paused)
            context.decode(8)
            assert bool((sampler._weight[:64] > 0).any()) is known
        assert len(ledger) == context._llm.n_tokens == 64
