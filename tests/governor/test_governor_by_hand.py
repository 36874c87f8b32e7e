"""What a caller can ask of a governor, and what is refused with one clear line."""

from __future__ import annotations

import math

import msgspec
import pytest
from governor_help import counts, steps

from psi_kv_governor.cache import Capability
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import Mode
from psi_kv_governor.engines.simulated import CAPABLE, CELL_BYTES, SimulatedEngine
from psi_kv_governor.errors import BadInputError, EngineError
from psi_kv_governor.events import Degraded, Recomputed, Restored, Trimmed
from psi_kv_governor.governor import Governor

MAY_GO = 3000 - 600
"""All but the floor, a fifth of the context."""


def refused(call, words: str) -> None:
    with pytest.raises(BadInputError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
    assert error.value.exit_status == 2


def test_a_trim_gives_up_that_share_of_what_may_go(open_governor, engine, events):
    governor = open_governor()
    governor.subscribe(events.append)
    result = governor.trim(fraction=0.5)
    assert MAY_GO / 2 <= result.cells < MAY_GO / 2 + 64
    assert result.bytes_returned == result.cells * CELL_BYTES
    assert [type(event) for event in events] == [Trimmed]
    assert events[0].reason == "by hand"
    assert governor.trim(1.0).cells == MAY_GO - result.cells
    assert governor.trim(1.0).cells == 0
    assert counts(engine).live == 600


def test_a_trim_that_gives_nothing_says_why(open_governor):
    governor = open_governor()
    governor.trim(1.0)
    assert governor.trim(1.0).problem != ""
    assert governor.trim(0.0).problem == ""


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan, math.inf, -math.inf])
def test_a_share_out_of_its_range_is_refused(open_governor, engine, fraction):
    governor = open_governor()
    refused(lambda: governor.trim(fraction), "is not usable: give a share from 0 to 1")
    assert counts(engine).live == 3000


def test_a_restore_brings_back_all_or_so_many(open_governor, events):
    governor = open_governor()
    masked = governor.trim(1.0).cells
    governor.subscribe(events.append)
    first = governor.restore(max_bytes=640 * CELL_BYTES)
    assert first.cells == 640
    assert governor.restore(0).cells == governor.restore(-5).cells == 0
    rest = governor.restore()
    assert rest.cells == masked - 640
    assert [event.cells for event in events if isinstance(event, Restored)] == [640, rest.cells]


def test_parking_by_hand_spares_what_is_running_unless_it_is_named(open_governor, engine):
    engine.decode(500, sequence=1)
    engine.caches[1].sequence(1).running = False
    engine.save(5000)
    governor = open_governor()
    result = governor.park()
    assert (result.cells, result.bytes_returned) == (500, 500 * CELL_BYTES + 5000)
    assert (counts(engine).resident, counts(engine, 1).resident) == (3000, 0)
    assert governor.status().parked_bytes == 500 * CELL_BYTES + 5000
    assert governor.park(0).cells == 3000
    assert governor.unpark(1).bytes_back == 500 * CELL_BYTES
    assert governor.unpark().cells == 3000
    assert counts(engine).masked == counts(engine, 1).masked == 0


@pytest.mark.parametrize("verb", ["park", "unpark"])
def test_a_sequence_that_is_not_there_is_said(open_governor, verb):
    result = getattr(open_governor(), verb)(9)
    assert result.problem == "there is no sequence 9: there are 0"


@pytest.mark.parametrize("share", [-0.01, 1.01, math.nan, math.inf])
def test_a_limit_out_of_its_range_is_refused(open_governor, limit, share):
    limit(0.5)
    refused(lambda: limit(share), "is not usable: give a share from 0 to 1, or None")
    refused(lambda: open_governor().limit(share), "is not usable: give a share from 0 to 1, or None")


def test_a_limit_is_a_share_or_bytes(open_governor):
    governor = open_governor()
    refused(lambda: governor.limit(0.5, n_bytes=5), "give one of them")
    refused(lambda: governor.limit(n_bytes=-1), "give 0 or more")
    governor.limit(0.5)
    assert (governor.status().limit, governor.status().limit_bytes) == (0.5, None)
    governor.limit(n_bytes=0)
    assert (governor.status().limit, governor.status().limit_bytes) == (None, 0)


@pytest.mark.parametrize("share", [0, 0.0, 0.7, 1, None])
def test_a_limit_within_it_is_taken(limit, share):
    limit(share)


def test_an_unknown_policy_is_refused(engine, source):
    refused(lambda: Governor(engine, source=source, config=GovernorConfig(policy="windov")), "windov.*window")


def test_a_status_tells_how_things_stand(open_governor, source, engine):
    governor = open_governor(name="my program")
    source.stall, source.headroom_bytes, source.limit_bytes = 0.3, 10 << 20, 100 << 20
    governor.step()
    status = governor.status()
    assert (status.mode, status.name, status.source) == (Mode.TRIMMING, "my program", source.name)
    assert (status.some, status.full, status.headroom_bytes) == (0.3, 0.3, 10 << 20)
    assert status.live_cells + status.masked_cells == 3000
    assert status.resident_bytes == status.live_cells * CELL_BYTES
    assert status.parked_bytes == status.written_bytes == status.masked_cells * CELL_BYTES > 0
    assert (status.lost_cells, status.affected_tokens) == (0, 0)
    engine.decode(3)
    assert governor.status().affected_tokens == 3
    assert governor.status().caches[0].sequences[0].masked_cells == status.masked_cells


@pytest.mark.parametrize(
    ("stall", "headroom_bytes", "there_is"),
    [
        (0.0, None, True),  # nothing tells, and nothing stalls
        (0.0, 1 << 30, True),
        (0.05, 1 << 30, True),  # between the thresholds is no pressure
        (1.0, None, False),
        (0.0, 1 << 20, False),
    ],
)
def test_room_is_what_is_above_the_low_line_when_nothing_presses(
    open_governor, source, stall, headroom_bytes, there_is
):
    governor = open_governor()
    source.stall, source.headroom_bytes, source.limit_bytes = stall, headroom_bytes, 2 << 30
    governor.step()
    assert governor.has_room() is there_is


def test_what_was_recomputed_is_told(open_governor, events):
    governor = open_governor()
    governor.subscribe(events.append)
    governor.recomputed(40, 0.5)
    assert [(type(event), event.cells, event.seconds) for event in events] == [(Recomputed, 40, 0.5)]


def test_a_cache_that_can_do_nothing_is_governed_in_vain_and_says_why(open_governor, source, events):
    unable = Capability(able=False, why="the cache is on the moon")
    able = msgspec.structs.replace(CAPABLE, release=unable, park=unable, mask=unable, blobs=unable)
    engine = SimulatedEngine(capabilities=able)
    engine.add_cache(4096)
    engine.decode(3000)
    governor = open_governor(engine=engine)
    governor.subscribe(events.append)
    assert governor.trim().problem == "the cache is on the moon"
    assert governor.restore().cells == 0
    source.stall = 1.0
    steps(governor, 3)
    assert governor.status().mode is Mode.HOLDING
    assert not [event for event in events if isinstance(event, Degraded | Trimmed)]


def test_protected_positions_stay_until_they_are_unprotected(open_governor, engine):
    governor = open_governor()
    governor.protect(200, 2900)
    governor.trim(1.0)
    assert counts(engine).masked == 200 - 64
    governor.unprotect(200, 1000)
    governor.trim(1.0)
    assert counts(engine).masked == 1000 - 64
    governor.unprotect()
    governor.trim(1.0)
    assert counts(engine).live == 600


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 5), (6, 5)])
def test_positions_that_make_no_sense_are_refused(open_governor, start, stop):
    refused(lambda: open_governor().protect(start, stop), "give 0 <= start < stop")


def test_an_engine_that_is_gone_is_told_to_who_asks(open_governor, engine):
    governor = open_governor()
    engine.close()
    for call in (governor.trim, governor.restore, governor.park, governor.unpark):
        with pytest.raises(EngineError, match="closed"):
            call()
