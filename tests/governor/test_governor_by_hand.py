"""What a caller can ask of a governor, and what is refused with one clear line."""

from __future__ import annotations

import math

import pytest

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.control import Mode
from psi_kv_governor.engine.base import Capability
from psi_kv_governor.engine.idle import IdleEngine
from psi_kv_governor.engine.llama.selftest import unable
from psi_kv_governor.engine.simulated import SimulatedEngine
from psi_kv_governor.errors import BadInputError, EngineError
from psi_kv_governor.events import Degraded, Recomputed, Restored, Trimmed
from psi_kv_governor.governor import Governor
from psi_kv_governor.ledger import LIVE, SPILLED
from psi_kv_governor.policy.base import Range
from psi_kv_governor.store.disk import DiskStore


def refused(call, words: str) -> None:
    with pytest.raises(BadInputError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
    assert error.value.exit_status == 2


def test_a_trim_gives_up_that_share_of_what_may_go(open_governor, engine, events):
    governor = open_governor()
    governor.subscribe(events.append)
    may_go = 3000 - 64 - 256
    result = governor.trim(fraction=0.5)
    assert may_go / 2 <= result.cells < may_go / 2 + 64
    assert result.bytes_returned == result.cells * engine.cell_bytes
    assert [type(event) for event in events] == [Trimmed]
    assert events[0].reason == "by hand"
    assert governor.trim(1.0).cells == may_go - result.cells
    assert governor.trim(1.0).cells == 0
    assert engine.ledger.count(LIVE) == 64 + 256


def test_nothing_is_a_share_too(open_governor):
    assert open_governor().trim(0.0).cells == 0


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan, math.inf, -math.inf])
def test_a_share_out_of_its_range_is_refused(open_governor, engine, fraction):
    governor = open_governor()
    refused(lambda: governor.trim(fraction), "is not usable: give a share from 0 to 1")
    assert engine.ledger.count(LIVE) == 3000


def test_a_restore_brings_back_all_or_so_many(open_governor, engine, events):
    governor = open_governor()
    spilled = governor.trim(1.0).cells
    governor.subscribe(events.append)
    first = governor.restore(max_cells=640)  # in whole blobs of 64
    assert 640 - 64 < first.cells <= 640
    assert first.missing == spilled - first.cells
    assert governor.restore(0).cells == 0
    assert governor.restore(-5).cells == 0
    rest = governor.restore()
    assert (rest.cells, rest.missing) == (spilled - first.cells, 0)
    assert [event.cells for event in events if isinstance(event, Restored)] == [first.cells, 0, 0, rest.cells]


@pytest.mark.parametrize("share", [-0.01, 1.01, math.nan, math.inf])
def test_a_limit_out_of_its_range_is_refused(limit, share):
    limit(0.5)
    refused(lambda: limit(share), "is not usable: give a share from 0 to 1, or None")


@pytest.mark.parametrize("share", [0, 0.0, 0.7, 1, None])
def test_a_limit_within_it_is_taken(limit, share):
    limit(share)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"low": 0.3, "high": 0.2}, "low = 0.3 is not usable: it must not be above high"),
        ({"high": -0.1}, "high = -0.1 is not usable: give a share from 0 to 1"),
        ({"high": math.nan}, "high = nan is not usable"),
        ({"low": math.nan}, "low = nan is not usable"),
        ({"quiet_s": -1.0}, "quiet_s = -1.0 is not usable: give 0 or more"),
        ({"poll_s": 0.0}, "poll_s = 0.0 is not usable: give seconds above 0"),
        ({"floor_cells": -1}, "floor_cells = -1 is not usable"),
        ({"block_cells": 0}, "block_cells = 0 is not usable"),
    ],
)
def test_nonsense_thresholds_are_refused(settings, words):
    refused(lambda: GovernorConfig(**settings), words)


def test_an_unknown_policy_is_refused(engine, source):
    refused(lambda: Governor(engine, source=source, config=GovernorConfig(policy="windov")), "windov.*window")


def test_a_folder_that_was_named_and_cannot_be_used_is_refused(engine, source, tmp_path):
    (tmp_path / "file").write_text("")
    config = GovernorConfig(store_dir=str(tmp_path / "file"))
    refused(lambda: Governor(engine, source=source, config=config), "cannot spill to .*/file")


def test_a_default_folder_that_cannot_be_used_is_lived_with(open_governor, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    governor = open_governor(store=None)
    assert "what goes is evicted and recomputed later" in caplog.records[0].message
    result = governor.trim(0.5)
    assert result.cells > result.spilled == 0


def test_the_configured_store_is_opened(open_governor, folder_on_disk):
    governor = open_governor(store=None, config=GovernorConfig(store_dir=str(folder_on_disk)))
    assert isinstance(governor._store, DiskStore)
    assert governor.trim(0.2).spilled > 0
    assert governor.status().store_bytes > 0
    assert governor.restore().missing == 0


@pytest.fixture
def folder_on_disk(tmp_path):
    from psi_kv_governor.store.mounts import memory_backed

    if why := memory_backed(tmp_path):
        pytest.skip(f"a store needs a disk: {why}")
    return tmp_path


def test_a_status_tells_how_things_stand(open_governor, source, engine, store):
    governor = open_governor()
    source.stall, source.headroom_bytes, source.limit_bytes = 0.3, 10 << 20, 100 << 20
    governor.step()
    status = governor.status()
    assert status.mode is Mode.TRIMMING
    assert status.source == source.name
    assert (status.some, status.full, status.headroom_bytes) == (0.3, 0.3, 10 << 20)
    assert status.live_cells + status.spilled_cells == 3000
    assert (status.lost_cells, status.holes) == (0, status.spilled_cells)
    assert status.cell_bytes == engine.cell_bytes
    assert status.live_bytes == status.live_cells * engine.cell_bytes
    assert status.store_bytes == store.used_bytes > 0


@pytest.mark.parametrize(
    ("stall", "headroom_bytes", "cells_and_room"),
    [
        (0.0, None, {10**9: True}),  # nothing tells, and nothing stalls
        (0.0, 1 << 30, {1000: True, 50_000: False}),
        (0.05, 1 << 30, {1000: True}),  # between the thresholds is no pressure
        (1.0, None, {1: False}),
        (0.0, 1 << 20, {1: False}),
    ],
)
def test_room_is_what_is_above_the_low_line_when_nothing_presses(
    open_governor, source, stall, headroom_bytes, cells_and_room
):
    governor = open_governor()
    source.stall, source.headroom_bytes, source.limit_bytes = stall, headroom_bytes, 2 << 30
    governor.step()
    assert {cells: governor.has_room_for(cells) for cells in cells_and_room} == cells_and_room


def test_room_comes_back_with_the_first_quiet_reading(open_governor, source):
    governor = open_governor()
    source.stall = 1.0
    governor.step()
    assert not governor.has_room_for(1)
    source.stall = 0.0
    governor.step()
    assert governor.has_room_for(1)  # a request may have its prefix; the rest waits until it stays quiet
    assert governor.status().spilled_cells > 0


def test_what_was_recomputed_is_told(open_governor, events):
    governor = open_governor()
    governor.subscribe(events.append)
    governor.recomputed(40, 0.5)
    assert [(type(event), event.cells, event.seconds) for event in events] == [(Recomputed, 40, 0.5)]


def test_a_cache_that_can_do_nothing_is_governed_in_vain_and_says_why(open_governor, source, events):
    engine = IdleEngine(unable("the cache is on the moon"))
    governor = open_governor(engine=engine)
    governor.subscribe(events.append)
    assert governor.capabilities.spill == Capability(False, "the cache is on the moon")
    with pytest.raises(EngineError, match="on the moon"):
        governor.trim()
    assert governor.restore().cells == 0
    source.stall = 1.0
    for _ in range(3):
        governor.step()
    assert governor.status().mode is Mode.HOLDING
    assert not [event for event in events if isinstance(event, Degraded | Trimmed)]


def test_protected_cells_are_never_given_up(open_governor, engine):
    governor = open_governor()
    governor.trim(1.0)
    assert list(engine.ledger.ranges(SPILLED)) == [Range(64, 3000 - 256)]


def test_a_short_context_has_nothing_to_give(open_governor, source):
    small = SimulatedEngine(512)
    small.grow(300)
    governor = open_governor(engine=small)
    assert governor.trim(1.0).cells == 0
    source.stall = 1.0
    governor.step()
    assert small.ledger.count(LIVE) == 300
