"""The loop: what the machine says becomes what the cache does."""

from __future__ import annotations

import gc
import logging
import weakref
from pathlib import Path

import pytest
from governor_help import governors, of_kind, steps, until

from psi_kv_governor.control import LawState, Mode, Turn, decide
from psi_kv_governor.events import ModeChanged, Released, Restored, Trimmed
from psi_kv_governor.governor import Governor
from psi_kv_governor.ledger import LIVE, SPILLED

pytestmark = pytest.mark.timeout(60)


def test_a_calm_machine_costs_nothing(open_governor, events, engine):
    governor = open_governor()
    governor.subscribe(events.append)
    steps(governor, 20)
    assert events == []
    assert engine.ledger.count(LIVE) == 3000


def test_stall_trims_and_quiet_brings_back(open_governor, source, engine, events):
    governor = open_governor()
    governor.subscribe(events.append)
    source.stall = 0.5
    governor.step()
    trimmed = of_kind(events, Trimmed)
    assert len(trimmed) == 1
    assert trimmed[0].cells == trimmed[0].spilled == engine.ledger.count(SPILLED) > 0
    assert "stall 50%" in trimmed[0].reason
    source.stall = 0.05  # neither pressure nor quiet
    steps(governor, 3)
    assert len(of_kind(events, Trimmed)) == 1
    assert of_kind(events, Restored) == []
    source.stall = 0.0
    steps(governor, 30)
    assert engine.ledger.count(LIVE) == 3000
    assert sum(event.cells for event in of_kind(events, Restored)) == trimmed[0].cells
    assert [event.new for event in of_kind(events, ModeChanged)] == [
        Mode.TRIMMING,
        Mode.WATCHING,
        Mode.HOLDING,
        Mode.RESTORING,
        Mode.CALM,
    ]
    told = of_kind(events, ModeChanged)
    assert [event.old for event in told] == [Mode.CALM, *(event.new for event in told[:-1])]
    assert all(event.reason for event in told)


def test_a_lack_of_headroom_trims_without_any_stall(open_governor, source, engine):
    governor = open_governor()
    source.limit_bytes, source.headroom_bytes = 1 << 30, 1 << 20
    governor.step()
    assert governor.status().mode is Mode.TRIMMING
    assert engine.ledger.count(SPILLED) > 0


def test_the_floor_and_the_budget_hold_however_long_it_lasts(open_governor, source, engine):
    governor = open_governor()
    source.stall = 1.0
    steps(governor, 500)
    assert engine.ledger.count(LIVE) >= 0.2 * 3000
    assert governor.status().mode is Mode.HOLDING


def test_it_looks_more_often_where_headroom_is_small(open_governor, source):
    governor = open_governor()
    config = governor.config
    assert governor.step() == config.poll_s
    source.limit_bytes, source.headroom_bytes = 1 << 30, int(0.05 * (1 << 30))
    assert governor.step() == config.poll_busy_s
    source.headroom_bytes = 1 << 30
    source.limit_bytes = 1 << 31
    assert config.poll_busy_s < governor.step() <= config.poll_s


def test_pages_of_cells_nobody_uses_go_back_also_when_calm(open_governor, engine, events):
    governor = open_governor()
    governor.subscribe(events.append)
    engine.truncate(1000, None)
    steps(governor, 2)
    assert [event.bytes_returned for event in of_kind(events, Released)] == [2000 * engine.cell_bytes]


def test_the_limit_of_the_process_holds_under_pressure_only(open_governor, source, engine, limit):
    governor = open_governor()
    limit(0.4)
    governor.step()
    assert engine.ledger.count(LIVE) == 3000
    source.stall = 0.11
    governor.step()
    assert 0.37 * 3000 < engine.ledger.count(LIVE) <= 0.4 * 3000  # in one trim
    limit(None)
    source.stall = 0.0
    steps(governor, 100)
    assert engine.ledger.count(LIVE) == 3000
    source.stall = 0.11
    governor.step()
    assert engine.ledger.count(LIVE) > 0.8 * 3000  # a usual step


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_it_starts_once_and_ends_once(open_governor, source, store):
    before = governors()
    governor = open_governor()
    governor.start()
    governor.start()
    assert governors() == before + 1
    governor.close()
    governor.close()
    assert governors() == before
    assert source.closed == 0  # it was given, and is closed by whoever made it
    governor.start()  # it stays closed
    assert governors() == before


def test_it_is_a_context(open_governor, source, engine):
    before = governors()
    source.stall = 1.0
    with open_governor() as governor:
        until(lambda: engine.ledger.count(SPILLED) > 0)
        assert governors() == before + 1
    assert governors() == before
    assert governor.status().store_bytes > 0  # so is a store that was given


def test_a_governor_that_is_only_dropped_goes_with_its_thread_and_its_files(engine):
    def use() -> weakref.ref:
        governor = Governor(engine)
        governor.start()
        governor.trim(0.1)
        return weakref.ref(governor)

    use()
    gc.collect()
    before = open_files()
    left = [use() for _ in range(3)]
    until(lambda: [governor() for governor in left] == [None, None, None])  # nothing points back to it
    until(lambda: governors() == 0)
    until(lambda: open_files() <= before)  # less where an earlier test's garbage went meanwhile


def test_after_its_end_it_holds_nothing_back(open_governor, source, engine, caplog):
    caplog.set_level(logging.ERROR)
    governor = open_governor()
    source.stall = 1.0
    governor.step()
    assert not governor.has_room_for(1)
    governor.close()
    assert governor.has_room_for(1)
    assert governor.restore().missing >= 0
    assert governor.trim(0.1).cells > 0
    assert caplog.records == []


def test_each_turn_is_told_whole_and_replays_to_the_same_decisions(open_governor, source):
    governor = open_governor()
    turns: list[Turn] = []
    end = governor.observe(turns.append)
    source.stall = 1.0
    steps(governor, 3)
    end()
    steps(governor, 1)
    assert len(turns) == 3
    assert turns[1].cache.live_cells < turns[0].cache.live_cells
    state = LawState()
    for turn in turns:
        decision, state = decide(governor.config, state, turn.reading, turn.cache, turn.cache_limit)
        assert decision == turn.decision
