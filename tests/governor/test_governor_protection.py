"""What a caller marks, what is protected by itself, and what there is to give beside it."""

from __future__ import annotations

import pytest
from governor_help import plans_of, refused, state

from psi_kv_governor.cache import Range, Verb
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.simulated import SimulatedEngine


def test_protected_cells_are_never_given_up(open_governor, engine):
    governor = open_governor(config=GovernorConfig(floor_share=0.0, floor_cells=0))
    governor.protect(400, 500)
    governor.protect(500, 600, sequence=0)
    governor.protect(600, 700, sequence=1)
    governor.trim(1.0)
    assert state(engine).live == (Range(0, 64), Range(400, 600), Range(2744, 3000))
    governor.unprotect(450)
    governor.trim(1.0)
    assert state(engine).live == (Range(0, 64), Range(400, 450), Range(2744, 3000))


def test_a_running_sequence_is_masked_and_an_idle_one_parked(open_governor, engine, monkeypatch):
    engine.decode(100, sequence=1)
    engine.caches[1].sequence(1).running = False
    plans = plans_of(engine, monkeypatch)
    open_governor().trim(0.5)
    assert [(step.verb, step.sequence) for step in plans[0].steps] == [(Verb.PARK, 1), (Verb.MASK, 0)]


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 5), (9, 3)])
def test_positions_that_make_no_sense_are_refused(open_governor, start, stop):
    governor = open_governor()
    for mark in (governor.protect, governor.unprotect):
        refused(lambda mark=mark: mark(start, stop), f"positions {start} to {stop} are not usable")


def test_a_short_context_has_nothing_to_give(open_governor, source):
    small = SimulatedEngine()
    small.add_cache(512).sequence(0).running = True
    small.decode(300)
    governor = open_governor(engine=small)
    assert "all 300 live cells are protected" in governor.trim(1.0).problem
    source.stall = 1.0
    governor.step()
    assert state(small).live_cells == 300
