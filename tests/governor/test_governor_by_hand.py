"""What a caller can ask of a governor, and what is refused with one clear line."""

from __future__ import annotations

import math
import os

import msgspec
import pytest
from governor_help import of_kind, plans_of, refused, state

from psi_kv_governor.cache import Capability, Result
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import SLICE_BYTES, Mode
from psi_kv_governor.engines.simulated import CAPABLE, CELL_BYTES, SimulatedEngine
from psi_kv_governor.errors import EngineError
from psi_kv_governor.events import Degraded, Recomputed, Restored, Trimmed
from psi_kv_governor.governor import Governor

FLOOR = 600  # a fifth of 3,000


def test_a_trim_gives_up_that_share_of_what_may_go(open_governor, engine, events):
    governor = open_governor()
    governor.subscribe(events.append)
    may_go = 3000 - FLOOR
    result = governor.trim(fraction=0.5)
    assert may_go / 2 <= result.cells < may_go / 2 + 64
    assert result.masked == result.cells
    assert result.bytes_returned == result.cells * CELL_BYTES
    assert [(event.cells, event.reason) for event in of_kind(events, Trimmed)] == [(result.cells, "by hand")]
    assert governor.trim(1.0).cells == may_go - result.cells
    assert state(engine).live_cells == FLOOR


def test_a_trim_that_gives_nothing_says_why(open_governor):
    governor = open_governor()
    governor.trim(1.0)
    nothing = governor.trim(1.0)
    assert (nothing.cells, nothing.problem) == (0, "the floor of 600 cells holds: 600 are live")


def test_what_nobody_decodes_goes_whole_and_is_read_back_when_it_is_needed(open_governor, engine, sequence):
    sequence.running = False
    governor = open_governor()
    result = governor.trim(1.0)
    assert (result.cells, result.masked) == (3000, 0)
    assert governor.trim(1.0).problem == "all that can be parked is parked already"
    engine.decode(1)
    assert state(engine).live_cells == 3001
    assert state(engine).parked_bytes == 0


def test_nothing_is_a_share_too(open_governor):
    assert open_governor().trim(0.0).cells == 0


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan, math.inf, -math.inf])
def test_a_share_out_of_its_range_is_refused(open_governor, engine, fraction):
    governor = open_governor()
    refused(lambda: governor.trim(fraction), "is not usable: give a share from 0 to 1")
    assert state(engine).live_cells == 3000


def test_a_restore_brings_back_all_or_so_many_bytes_in_slices(open_governor, engine, events, monkeypatch):
    governor = open_governor()
    gone = governor.trim(1.0).cells
    governor.subscribe(events.append)
    plans = plans_of(engine, monkeypatch)
    first = governor.restore(max_bytes=640 * CELL_BYTES)
    assert first.cells == 640
    assert governor.restore(0).cells == 0
    assert governor.restore(-5).cells == 0
    rest = governor.restore()
    assert rest.cells == gone - 640
    assert state(engine).live_cells == 3000
    assert all(plan.max_bytes is not None and 0 < plan.max_bytes <= SLICE_BYTES for plan in plans)
    assert len(plans) >= gone * CELL_BYTES / SLICE_BYTES
    assert [event.cells for event in of_kind(events, Restored)] == [640, rest.cells]
    assert [event.masked_bytes for event in of_kind(events, Restored)] == [(gone - 640) * CELL_BYTES, 0]


@pytest.mark.parametrize("late", [1, 3, 1000])
def test_slices_that_come_too_late_to_bring_anything_do_not_end_it(
    open_governor, engine, sequence, monkeypatch, late
):
    """The machine stood still for 0.05 s, again and again."""
    governor = open_governor()
    masked = governor.trim(1.0).cells
    apply, left = engine.apply, [0]

    def stood_still(plan):
        left[0] -= 1
        return Result(done=False) if left[0] >= 0 else apply(plan)

    monkeypatch.setattr(engine, "apply", stood_still)
    left[0] = late
    back = governor.restore()
    assert (back.cells, back.done) == ((masked, True) if late < 1000 else (0, False))
    sequence.running, left[0] = False, 0
    parked = governor.park().bytes_returned
    left[0] = late
    assert governor.unpark().bytes_back == (parked if late < 1000 else 0)


# -- parking -----------------------------------------------------------------------------------------------


def test_idle_sequences_and_saved_states_are_parked_and_read_back_by_hand(open_governor, engine):
    engine.decode(200, sequence=1)
    engine.caches[1].sequence(1).running = False
    blob = engine.save(5000)
    governor = open_governor()
    parked = governor.park()
    assert parked.bytes_returned == 200 * CELL_BYTES + 5000
    assert engine.caches[1].blobs[blob].parked
    assert state(engine, 0).parked_bytes == 0  # it is being decoded
    assert governor.park().problem == "all of it is parked already"
    back = governor.unpark()
    assert back.bytes_back == 200 * CELL_BYTES
    assert state(engine, 1).parked_bytes == 0


def test_one_sequence_is_parked_whatever_is_done_with_it_and_no_other(open_governor, engine):
    for number in (1, 2):
        engine.decode(200, sequence=number)
        engine.caches[1].sequence(number).running = False
    governor = open_governor()
    assert governor.park(2).cells == 200
    assert state(engine, 1).parked_bytes == 0
    assert governor.park(0).cells == 3000  # it was named: the next token reads it back
    assert governor.park(7).problem == "there is no sequence 7: there are 0, 1, 2"
    assert governor.unpark(7).problem == "there is no sequence 7: there are 0, 1, 2"
    assert governor.unpark(2).cells == 200


def test_one_process_is_parked_and_the_others_are_not(open_governor, engine):
    other = engine.add_cache(512, pid=4711)
    engine.decode(100, cache=other.id)
    other.sequence(0).running = False
    engine.caches[1].sequence(0).running = False
    governor = open_governor()
    assert governor.park(pid=4711).cells == 100
    assert state(engine).parked_bytes == 0
    assert governor.unpark(pid=os.getpid()).cells == 0
    assert governor.unpark(pid=4711).cells == 100


def test_a_long_unpark_is_cut_into_slices(open_governor, engine, sequence, monkeypatch):
    sequence.running = False
    governor = open_governor()
    governor.park()
    plans = plans_of(engine, monkeypatch)
    assert governor.unpark().cells == 3000
    assert len(plans) >= 3000 * CELL_BYTES / SLICE_BYTES


# -- limits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [-0.01, 1.01, math.nan, math.inf])
def test_a_limit_out_of_its_range_is_refused(limit, open_governor, share):
    limit(0.5)
    refused(lambda: limit(share), "is not usable: give a share from 0 to 1, or None")
    refused(lambda: open_governor().limit(share), "is not usable: give a share from 0 to 1, or None")


@pytest.mark.parametrize("share", [0, 0.0, 0.7, 1, None])
def test_a_limit_within_it_is_taken(limit, share):
    limit(share)


def test_a_limit_is_a_share_or_bytes(open_governor):
    governor = open_governor()
    refused(lambda: governor.limit(0.5, n_bytes=5), "give one of them")
    refused(lambda: governor.limit(n_bytes=-1), "a cache limit of -1 bytes is not usable: give 0 or more")
    governor.limit(n_bytes=1 << 20)
    assert (governor.status().limit, governor.status().limit_bytes) == (None, 1 << 20)
    governor.limit(0.5)
    assert (governor.status().limit, governor.status().limit_bytes) == (0.5, None)
    governor.limit()
    assert (governor.status().limit, governor.status().limit_bytes) == (None, None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"low": 0.3, "high": 0.2}, "low = 0.3 is not usable: it must not be above high"),
        ({"high": -0.1}, "high = -0.1 is not usable"),
        ({"high": math.nan}, "high = nan is not usable"),
        ({"low": math.nan}, "low = nan is not usable"),
        ({"quiet_s": -1.0}, "quiet_s = -1.0 is not usable"),
        ({"poll_s": 0.0}, "poll_s = 0.0 is not usable"),
        ({"floor_cells": -1}, "floor_cells = -1 is not usable"),
        ({"block_cells": 0}, "block_cells = 0 is not usable"),
    ],
)
def test_nonsense_thresholds_are_refused(settings, words):
    refused(lambda: GovernorConfig(**settings), words)


def test_an_unknown_policy_is_refused(engine, source):
    refused(lambda: Governor(engine, source=source, config=GovernorConfig(policy="windov")), "windov.*window")


# -- telling -----------------------------------------------------------------------------------------------


def test_a_status_tells_how_things_stand(open_governor, source, engine):
    engine.decode(100, sequence=1)
    engine.caches[1].sequence(1).running = False
    governor = open_governor(name="a model")
    source.stall, source.headroom_bytes, source.limit_bytes = 0.3, 10 << 20, 100 << 20
    governor.step()
    status = governor.status()
    assert (status.mode, status.name, status.source) == (Mode.TRIMMING, "a model", source.name)
    assert "stall 30%" in status.reason
    assert (status.some, status.full, status.headroom_bytes) == (0.3, 0.3, 10 << 20)
    assert [level.limit_bytes for level in status.levels] == [100 << 20]
    assert status.live_cells + status.masked_cells == 3100
    assert status.parked_bytes == 100 * CELL_BYTES + status.masked_cells * CELL_BYTES
    assert status.resident_bytes == 3100 * CELL_BYTES - status.parked_bytes
    assert status.dirty_bytes == status.resident_bytes  # nothing of it was ever written
    assert status.written_bytes == status.parked_bytes
    assert [(one.id, len(one.sequences)) for one in status.caches] == [(1, 2)]
    assert msgspec.json.decode(msgspec.json.encode(status), type=type(status)) == status


@pytest.mark.parametrize(
    ("stall", "headroom_bytes", "has_room"),
    [
        (0.0, None, True),  # nothing tells, and nothing stalls
        (0.0, 1 << 30, True),
        (0.05, 1 << 30, True),  # between the thresholds is no pressure
        (1.0, None, False),
        (0.0, 1 << 20, False),
    ],
)
def test_room_is_what_is_above_the_low_line_when_nothing_presses(
    open_governor, source, stall, headroom_bytes, has_room
):
    governor = open_governor()
    source.stall, source.headroom_bytes, source.limit_bytes = stall, headroom_bytes, 2 << 30
    governor.step()
    assert governor.has_room() is has_room


def test_what_was_recomputed_is_told(open_governor, events):
    governor = open_governor()
    governor.subscribe(events.append)
    governor.recomputed(40, 0.5)
    assert [(type(event), event.cells, event.seconds) for event in events] == [(Recomputed, 40, 0.5)]


def test_a_cache_that_can_do_nothing_is_governed_in_vain_and_says_why(open_governor, source, events):
    unable = Capability(able=False, why="the cache is on the moon")
    engine = SimulatedEngine(
        capabilities=msgspec.structs.replace(CAPABLE, release=unable, park=unable, mask=unable, blobs=unable)
    )
    engine.add_cache(4096)
    engine.decode(3000)
    governor = open_governor(engine=engine)
    governor.subscribe(events.append)
    assert governor.trim().problem == "the cache is on the moon"
    assert governor.park().problem == "the cache is on the moon"
    assert governor.restore().cells == 0
    source.stall = 1.0
    for _ in range(3):
        governor.step()
    assert governor.status().mode is Mode.HOLDING
    assert not [event for event in events if isinstance(event, Degraded | Trimmed)]


def test_an_engine_that_is_gone_is_told_to_who_asks_and_the_status_stays(open_governor, engine):
    governor = open_governor()
    engine.close()
    for act in (governor.trim, governor.restore, governor.park, governor.unpark):
        with pytest.raises(EngineError, match="closed"):
            act()
    assert governor.status().caches == ()
