"""The loop: what the machine says becomes what the caches do."""

from __future__ import annotations

import gc
import logging
import weakref
from pathlib import Path

import msgspec
import pytest
from governor_help import counts, governors, of_kind, steps, until

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import LawState, Mode, Turn, decide
from psi_kv_governor.engines.simulated import CELL_BYTES, SimulatedEngine
from psi_kv_governor.events import (
    CacheClosed,
    CacheOpened,
    Degraded,
    ModeChanged,
    Released,
    Restored,
    Trimmed,
)
from psi_kv_governor.governor import Governor

pytestmark = pytest.mark.timeout(60)


def test_a_calm_machine_costs_nothing(open_governor, events, engine):
    governor = open_governor()
    governor.subscribe(events.append)
    steps(governor, 20)
    assert [type(event) for event in events] == [CacheOpened]
    assert counts(engine).resident == 3000
    assert engine.snapshot().written_bytes == 0


def test_stall_trims_and_quiet_brings_back(open_governor, source, engine, events):
    governor = open_governor()
    governor.subscribe(events.append)
    source.stall = 0.5
    governor.step()
    trimmed = of_kind(events, Trimmed)
    assert len(trimmed) == 1
    assert trimmed[0].cells == trimmed[0].masked == counts(engine).masked > 0
    assert "stall 50%" in trimmed[0].reason
    source.stall = 0.05  # neither pressure nor quiet
    steps(governor, 3)
    assert len(of_kind(events, Trimmed)) == 1
    assert of_kind(events, Restored) == []
    source.stall = 0.0
    steps(governor, 60)
    assert counts(engine).live == 3000
    assert sum(event.cells for event in of_kind(events, Restored)) == trimmed[0].cells
    assert of_kind(events, Restored)[-1].masked_bytes == 0
    told = of_kind(events, ModeChanged)
    assert [told[0].new, told[-1].new] == [Mode.TRIMMING, Mode.CALM]
    assert [event.old for event in told] == [Mode.CALM, *(event.new for event in told[:-1])]
    assert all(event.reason for event in told)


def test_idle_sequences_go_before_running_ones_and_nothing_of_them_is_masked(open_governor, source, engine):
    idle = engine.caches[1].sequence(7)
    engine.decode(900, sequence=7)
    idle.running = False
    governor = open_governor()
    source.stall = 0.12
    steps(governor, 2)
    assert (counts(engine, 7).masked, counts(engine).masked) == (0, 0)
    assert counts(engine, 7).resident < 900
    engine.decode(1, sequence=7)  # whoever goes on with it reads it back
    assert counts(engine, 7).resident == 901


def test_saved_states_are_parked_as_soon_as_they_are_whole(open_governor, engine, events):
    governor = open_governor()
    governor.subscribe(events.append)
    engine.save(1 << 20)
    governor.step()
    assert engine.snapshot().caches[0].blobs[0].parked
    assert [event.bytes_returned for event in of_kind(events, Trimmed)] == [1 << 20]
    assert governor.status().parked_bytes == 1 << 20


def test_a_lack_of_headroom_trims_without_any_stall(open_governor, source, engine):
    governor = open_governor()
    source.limit_bytes, source.headroom_bytes = 1 << 30, 1 << 20
    governor.step()
    assert governor.status().mode is Mode.TRIMMING
    assert counts(engine).masked > 0


def test_the_floor_holds_however_long_it_lasts(open_governor, source, engine):
    governor = open_governor()
    source.stall = 1.0
    steps(governor, 500)
    assert counts(engine).live >= 0.2 * 3000
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


def test_dirty_pages_are_written_while_memory_is_nearly_short(open_governor, source, engine):
    governor = open_governor()
    source.limit_bytes, source.headroom_bytes = 1 << 30, int(0.05 * (1 << 30))
    governor.step()
    assert engine.snapshot().written_bytes > 0
    assert counts(engine).resident == 3000  # it is only written: nothing went


def test_the_limit_of_the_process_holds_under_pressure_only(open_governor, source, engine, limit):
    governor = open_governor()
    limit(0.4)
    governor.step()
    assert counts(engine).live == 3000
    source.stall = 0.11
    governor.step()
    assert 0.37 * 3000 < counts(engine).live <= 0.4 * 3000


def test_a_limit_in_bytes_is_kept_whatever_the_caches_hold(open_governor, source, engine):
    governor = open_governor()
    governor.limit(n_bytes=2000 * CELL_BYTES)
    source.stall = 0.11
    governor.step()
    assert 2000 - 64 < counts(engine).live <= 2000
    assert governor.status().limit_bytes == 2000 * CELL_BYTES
    engine.decode(500)
    steps(governor, 2)
    assert counts(engine).live <= 2000
    governor.limit()
    assert governor.status().limit_bytes is governor.status().limit is None


def test_caches_that_come_and_go_are_told(open_governor, engine, events):
    governor = open_governor()
    governor.subscribe(events.append)
    governor.step()
    second = engine.add_cache(512, name="draft", pid=4711)
    steps(governor, 3)
    engine.remove_cache(second.id)
    steps(governor, 3)
    engine.close()
    steps(governor, 3)
    opened = [(event.name, event.pid) for event in of_kind(events, CacheOpened)]
    assert opened[1] == ("draft", 4711)
    assert [event.name for event in of_kind(events, CacheClosed)] == ["draft", "simulated"]


def test_no_more_is_written_in_a_day_than_was_allowed(open_governor, source, engine, events):
    most = 200 * CELL_BYTES
    governor = open_governor(
        config=GovernorConfig(cooldown_s=0.0, write_limit_bytes_per_day=most, acute_full=1.0)
    )
    governor.subscribe(events.append)
    source.stall = 0.3
    steps(governor, 50)
    assert engine.snapshot().written_bytes < most + 0.2 * 3000 * CELL_BYTES  # the last step began below it
    assert "written today" in governor.trim(0.5).problem
    assert "in a day" in of_kind(events, Degraded)[0].why


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_it_starts_once_and_ends_once(open_governor, source):
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
    with open_governor():
        until(lambda: counts(engine).masked > 0)
        assert governors() == before + 1
    assert governors() == before
    assert engine.snapshot()  # the engine is its owner's to close


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
    governor = open_governor(jitter=None)
    turns: list[Turn] = []
    end = governor.observe(turns.append)
    source.stall = 1.0
    steps(governor, 3)
    source.stall = 0.0
    steps(governor, 30)
    end()
    seen = len(turns)
    steps(governor, 1)
    assert len(turns) == seen
    assert turns[1].cache.live_bytes < turns[0].cache.live_bytes
    assert turns[0].jitter > 0.0  # each process has its own, and a replay needs it
    state = LawState(jitter=turns[0].jitter)
    for turn in msgspec.json.decode(msgspec.json.encode(turns), type=list[Turn]):
        decision, state = decide(governor.config, state, turn.reading, turn.cache, turn.cache_limit)
        assert decision == turn.decision


def test_on_a_clock_of_its_own_no_time_passes_by_itself(source):
    now_s = 5000.0
    engine = SimulatedEngine(clock=lambda: now_s)
    engine.add_cache(4096).sequence(0).running = True
    engine.decode(3000)
    events: list = []
    with_clock = Governor(engine, source=source, clock=lambda: now_s, jitter=0.0)
    with_clock.subscribe(events.append)
    source.stall = 1.0
    with_clock.step()
    with_clock.close()
    assert [event.time_s for event in of_kind(events, Trimmed)] == [now_s]
