"""The loop: what the machine says becomes what the caches do."""

from __future__ import annotations

import gc
import logging
import weakref
from pathlib import Path

import pytest
from governor_help import governors, of_kind, plans_of, state, steps

from psi_kv_governor.cache import Plan, Verb
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import SLICE_BYTES, LawState, Mode, Turn, decide
from psi_kv_governor.engines.simulated import CELL_BYTES, SimulatedEngine
from psi_kv_governor.events import CacheClosed, CacheOpened, ModeChanged, Released, Restored, Trimmed
from psi_kv_governor.governor import Governor
from waiting import until


def test_a_calm_machine_costs_nothing(open_governor, events, engine):
    governor = open_governor()
    governor.subscribe(events.append)
    steps(governor, 20)
    assert [type(event) for event in events] == [CacheOpened]
    assert state(engine).live_cells == 3000


def test_stall_trims_and_quiet_brings_back(open_governor, source, engine, events):
    governor = open_governor()
    governor.subscribe(events.append)
    source.stall = 0.5
    governor.step()
    [trimmed] = of_kind(events, Trimmed)
    assert trimmed.cells == trimmed.masked == state(engine).masked_cells > 0
    assert trimmed.bytes_returned == trimmed.cells * CELL_BYTES
    assert "stall 50%" in trimmed.reason
    source.stall = 0.05  # neither pressure nor quiet
    steps(governor, 3)
    assert len(of_kind(events, Trimmed)) == 1
    assert of_kind(events, Restored) == []
    source.stall = 0.0
    steps(governor, 60)
    assert state(engine).live_cells == 3000
    restored = of_kind(events, Restored)
    assert sum(event.cells for event in restored) == trimmed.cells
    assert restored[-1].masked_bytes == 0
    modes = [event.new for event in of_kind(events, ModeChanged)]
    assert modes[0] is Mode.TRIMMING
    assert modes[-2:] == [Mode.RESTORING, Mode.CALM]
    changes = of_kind(events, ModeChanged)
    assert [event.old for event in changes] == [Mode.CALM, *(event.new for event in changes[:-1])]
    assert all(event.reason for event in changes)


def test_a_restore_takes_a_reading_between_two_slices_and_ends_with_the_first_that_is_not_quiet(
    open_governor, source, engine, monkeypatch
):
    governor = open_governor(config=GovernorConfig(cooldown_s=0.0, quiet_s=2.0, floor_share=0.0))
    governor.trim(1.0)
    away = state(engine).masked_cells
    assert away * CELL_BYTES > 3 * SLICE_BYTES
    plans = plans_of(engine, monkeypatch)

    def slices() -> list[Plan]:
        return [plan for plan in plans if plan.steps[0].verb is Verb.UNMASK]

    for _ in range(200):
        before = len(slices())
        governor.step()
        assert len(slices()) - before <= 1  # never two in a turn
        if len(slices()) == 2:
            break
    assert all(plan.max_bytes <= SLICE_BYTES and plan.deadline_s <= 0.05 for plan in slices())
    source.stall = 0.05
    steps(governor, 3)
    assert len(slices()) == 2
    assert 0 < state(engine).masked_cells < away


def test_a_lack_of_headroom_trims_without_any_stall(open_governor, source, engine):
    governor = open_governor()
    source.limit_bytes, source.headroom_bytes = 1 << 30, 1 << 20
    governor.step()
    assert governor.status().mode is Mode.TRIMMING
    assert state(engine).masked_cells > 0


def test_the_floor_and_the_budget_hold_however_long_it_lasts(open_governor, source, engine):
    governor = open_governor()
    source.stall = 1.0
    steps(governor, 300)
    assert state(engine).live_cells >= 0.2 * 3000
    assert governor.status().mode is Mode.HOLDING


def test_it_looks_more_often_where_headroom_is_small(open_governor, source):
    governor = open_governor()
    config = governor.config
    assert governor.step() == config.poll_s
    source.limit_bytes, source.headroom_bytes = 1 << 30, int(0.05 * (1 << 30))
    assert governor.step() == config.poll_busy_s


def test_pages_of_cells_nobody_uses_go_back_also_when_calm(open_governor, engine, events):
    governor = open_governor()
    governor.subscribe(events.append)
    engine.truncate(1000)
    steps(governor, 2)
    assert [event.bytes_returned for event in of_kind(events, Released)] == [2000 * CELL_BYTES]


def test_saved_states_are_parked_as_soon_as_they_are_whole(open_governor, engine):
    governor = open_governor()
    blob = engine.save(5 << 20)
    steps(governor, 3)
    assert engine.caches[1].blobs[blob].parked


def test_what_is_dirty_is_written_beforehand_when_memory_is_nearly_short(open_governor, source, engine):
    clock = iter(range(1000))
    governor = open_governor(clock=lambda: float(next(clock)))
    source.limit_bytes, source.headroom_bytes = 8 << 30, int(0.05 * (8 << 30))
    steps(governor, 10)
    assert state(engine).live_cells == 3000
    assert state(engine).dirty_bytes < 3000 * CELL_BYTES / 2
    assert state(engine).parked_bytes == 0


def test_the_limit_of_the_process_holds_under_pressure_only(open_governor, source, engine, limit):
    governor = open_governor()
    limit(0.4)
    governor.step()
    assert state(engine).live_cells == 3000
    source.stall = 0.11
    governor.step()
    assert 0.37 * 3000 < state(engine).live_cells <= 0.4 * 3000  # in one trim


def test_the_limit_of_one_governor_can_be_bytes(open_governor, source, engine):
    governor = open_governor()
    governor.limit(n_bytes=1200 * CELL_BYTES)
    source.stall = 0.11
    governor.step()
    assert 1200 - 64 < state(engine).live_cells <= 1200
    governor.limit()
    assert governor.status().limit_bytes is None


def test_what_was_used_least_recently_goes_first_across_all_caches(open_governor, source, monkeypatch):
    now_s = [0.0]
    engine = SimulatedEngine(clock=lambda: now_s[0])
    for used_s in (50.0, 20.0, 70.0):
        now_s[0] = used_s
        engine.decode(3000, cache=engine.add_cache(4096).id)
    now_s[0] = 100.0
    plans = plans_of(engine, monkeypatch)
    source.stall = 0.9
    open_governor(engine=engine).step()
    assert (plans[0].steps[0].verb, plans[0].steps[0].cache) == (Verb.PARK, 2)
    steps(open_governor(engine=engine), 12)
    order = [step.cache for plan in plans for step in plan.steps if step.verb is Verb.PARK]
    assert order == sorted(order, key=[2, 1, 3].index)


def test_caches_that_come_and_go_are_told(open_governor, engine, events):
    governor = open_governor(config=GovernorConfig(poll_s=1.0))
    governor.subscribe(events.append)
    governor.step()
    other = engine.add_cache(64, name="another", pid=4711)
    steps(governor, 3)
    engine.remove_cache(other.id)
    steps(governor, 3)
    assert [
        (type(e), e.cache, e.name) for e in of_kind(events, CacheOpened) + of_kind(events, CacheClosed)
    ] == [
        (CacheOpened, 1, "simulated"),
        (CacheOpened, other.id, "another"),
        (CacheClosed, other.id, "another"),
    ]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.usefixtures("no_others")
def test_it_starts_once_and_ends_once(open_governor, source):
    governor = open_governor()
    governor.start()
    governor.start()
    assert governors() == 1
    governor.close()
    governor.close()
    assert governors() == 0
    assert source.closed == 0  # it was given, and is closed by whoever made it
    governor.start()  # it stays closed
    assert governors() == 0


@pytest.mark.usefixtures("no_others")
def test_it_is_a_context(open_governor, source, engine):
    source.stall = 1.0
    with open_governor():
        until(lambda: state(engine).masked_cells > 0)
        assert governors() == 1
    assert governors() == 0


@pytest.mark.usefixtures("no_others")
def test_a_governor_that_is_only_dropped_goes_with_its_threads_and_its_files(engine):
    def use() -> weakref.ref:
        governor = Governor(engine)
        governor.start()
        governor.trim(0.1)
        return weakref.ref(governor)

    use()
    until(lambda: governors() == 0)
    gc.collect()
    before = open_files()
    left = [use() for _ in range(3)]
    until(lambda: [governor() for governor in left] == [None, None, None])  # nothing points back to it
    until(lambda: governors() == 0)
    until(lambda: open_files() <= before)  # less where an earlier test's garbage went meanwhile


def test_after_its_end_it_holds_nothing_back(open_governor, source, caplog):
    caplog.set_level(logging.ERROR)
    governor = open_governor()
    source.stall = 1.0
    governor.step()
    assert not governor.has_room()
    governor.close()
    assert governor.has_room()
    assert governor.restore().cells > 0
    assert governor.trim(0.1).cells > 0
    assert caplog.records == []


def test_each_turn_is_told_whole_and_replays_to_the_same_decisions(open_governor, source):
    governor = open_governor(jitter=0.3)
    turns: list[Turn] = []
    end = governor.observe(turns.append)
    source.stall = 1.0
    steps(governor, 3)
    end()
    steps(governor, 1)
    assert len(turns) == 3
    assert turns[1].cache.live_bytes < turns[0].cache.live_bytes
    law = LawState(jitter=0.3)
    for turn in turns:
        decision, law = decide(governor.config, law, turn.reading, turn.cache, turn.cache_limit)
        assert decision == turn.decision
