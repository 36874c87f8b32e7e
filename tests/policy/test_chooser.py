"""A policy at work: its blocks, what the caller marks, a policy that fails, and what comes back first."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from fakes import FakeSource
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engine.paper import PaperEvidence
from psi_kv_governor.engine.simulated import SimulatedEngine, SimulatedStore
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.governor import Governor
from psi_kv_governor.ledger import LIVE, SPILLED, Ledger
from psi_kv_governor.policy import Policy, Range, get_policy
from psi_kv_governor.policy.chooser import MOST_BLOCKS, Chooser, block_size, check_served
from psi_kv_governor.policy.window import Window

CONFIG = GovernorConfig(sink_cells=64, window_cells=128, block_cells=64)


def chooser_of(policy: Policy | str = "window", length: int = 1000, **arguments) -> Chooser:
    ledger = Ledger(2048)
    ledger.mark(Range(0, length), LIVE)
    policy = get_policy(policy) if isinstance(policy, str) else policy
    return Chooser(policy, PaperEvidence(ledger), ledger, CONFIG, row_bytes=mmap.PAGESIZE, **arguments)


def cells(ranges) -> set[int]:
    return {position for part in ranges for position in range(*part)}


class Broken(Policy):
    """Divides by zero."""

    name = "broken"
    source = "a test"

    def score(self, blocks, next_position, evidence):
        return np.array([1 // 0 for _ in blocks], dtype=np.float64)


def test_a_policy_that_fails_is_told_and_the_oldest_go():
    told = []
    chooser = chooser_of(Broken(), complain=told.append)
    assert chooser.choose(100) == [Range(64, 192)]
    assert told == [
        "the policy broken failed (integer division or modulo by zero): the oldest blocks go instead"
    ]


def test_the_system_prompt_counts_as_sinks():
    chooser = chooser_of()
    chooser.head_cells = 300
    assert chooser.choose(1) == [Range(300, 320)]
    assert chooser.trimmable() == 1000 - 300 - 128
    chooser.head_cells = 10  # shorter than the sinks
    assert chooser.choose(1) == [Range(64, 128)]


def test_marks_hold_until_they_are_taken_off():
    chooser = chooser_of()
    chooser.protect(Range(0, 200))
    chooser.protect(Range(150, 300))
    assert not cells(chooser.choose(10_000)) & set(range(300))
    chooser.unprotect(Range(100, 180))
    assert cells(chooser.choose(10_000)) & set(range(300)) == set(range(100, 180))
    chooser.unprotect(Range(0, 10_000))
    assert chooser.marked == ()


def test_no_more_goes_than_whole_blocks_of_the_configuration():
    """A larger block, as a scattered policy has it, would break the law's floor and budget."""
    chooser = chooser_of("random")
    chooser.block_cells = 256
    for wanted in (1, 64, 65, 200, 300):
        assert sum(part.cells for part in chooser.choose(wanted)) == -(-wanted // 64) * 64


@pytest.mark.parametrize(
    ("row_bytes", "capacity", "expected"),
    [
        (384, 4096, 64),  # SmolLM2-135M in f16: six pages of 4 KiB exactly
        (204, 4096, 128),  # the same in q8_0
        (2048, 8192, 64),  # an 8B Llama
        (2048, 131_072, 512),  # 256 blocks at most
        (34, 4096, 768),
    ],
)
def test_a_lone_block_fills_whole_pages(row_bytes, capacity, expected, monkeypatch):
    monkeypatch.setattr(mmap, "PAGESIZE", 4096)
    assert block_size(get_policy("random"), 64, row_bytes, capacity) == expected
    assert block_size(get_policy("window"), 64, row_bytes, capacity) == 64  # its blocks lie side by side
    assert capacity / block_size(get_policy("random"), 64, row_bytes, capacity) <= MOST_BLOCKS


def test_worth_is_the_last_known_score_also_of_what_is_away():
    chooser = chooser_of("keydiff")
    chooser.choose(1)
    scores = {start: chooser.worth(Range(start, start + 64)) for start in range(64, 832, 64)}
    assert len(set(scores.values())) == 12
    chooser._ledger.mark(Range(128, 192), SPILLED)
    chooser.choose(1)
    assert chooser.worth(Range(128, 192)) == scores[128]
    assert chooser.worth(Range(0, 64)) == -np.inf  # protected, so never scored
    assert chooser.worth(Range(5, 5)) == -np.inf


class Limited(PaperEvidence):
    """A cache of which the keys can't be read."""

    def why_not(self, kind):
        return "its keys are q4_0" if kind in {"key_norms", "key_diffs"} else ""


@pytest.mark.parametrize("name", ["keynorm", "keydiff", "hybrid"])
def test_a_policy_that_the_cache_cannot_serve_is_refused_with_those_that_it_can(name):
    with pytest.raises(BadInputError) as refused:
        check_served(get_policy(name), Limited(Ledger(0)), asked_for=True)
    assert str(refused.value) == (
        f"the policy {name} can't be used with this cache: its keys are q4_0; "
        "use window, fifo, lru, random, attention"
    )
    check_served(get_policy("attention"), Limited(Ledger(0)), asked_for=True)


def test_the_default_that_the_cache_cannot_serve_is_replaced_by_the_window_and_that_is_said():
    told: list[str] = []
    default, ledger = get_policy(GovernorConfig().policy), Ledger(1024)
    check_served(default, Limited(ledger))
    chooser = Chooser(default, Limited(ledger), ledger, GovernorConfig(), row_bytes=384, complain=told.append)
    assert chooser.policy == Window()
    assert told == [
        f"the policy {default.name} can't be used with this cache (its keys are q4_0): the oldest blocks go"
    ]


def test_the_governor_refuses_it_at_the_start():
    engine = SimulatedEngine(1024)
    engine._evidence = Limited(engine.ledger)
    with pytest.raises(BadInputError, match="the policy keydiff can't be used with this cache"):
        Governor(engine, source=FakeSource(), config=GovernorConfig(policy="keydiff", store="none"))


def test_evidence_is_collected_only_for_a_policy_that_needs_it():
    asked = []
    for name in ("window", "keydiff", "attention"):
        engine = SimulatedEngine(1024)
        engine._evidence.collect = asked.append
        Governor(engine, source=FakeSource(), config=GovernorConfig(policy=name, store="none")).close()
    assert asked == [frozenset(), {"key_diffs"}, {"attention"}]


@pytest.mark.parametrize("name", ["keynorm", "keydiff", "attention", "random", "window"])
def test_what_is_worth_most_comes_back_first(name):
    engine, store = SimulatedEngine(2048), SimulatedStore(1 << 30)
    engine.grow(1600)
    config = GovernorConfig(policy=name, sink_cells=64, window_cells=256)
    with Governor(engine, source=FakeSource(), store=store, config=config) as governor:
        governor._stop.set()  # by hand only
        governor.trim(0.8)
        away = [
            Range(start, min(start + 64, run.stop))
            for run in engine.ledger.ranges(SPILLED)
            for start in range(run.start, run.stop, 64)
        ]
        best = sorted(away, key=governor._chooser.worth, reverse=True)
        governor.restore(5 * 64)
        assert cells(engine.ledger.ranges(SPILLED)) == cells(best[5:])


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 5), (9, 3)])
def test_positions_that_make_no_sense_are_refused(start, stop):
    with Governor(SimulatedEngine(64), source=FakeSource(), config=GovernorConfig(store="none")) as governor:
        for mark in (governor.protect, governor.unprotect):
            with pytest.raises(BadInputError, match=f"positions {start} to {stop} are not usable"):
                mark(start, stop)


def test_the_governor_protects_what_the_caller_marks():
    engine = SimulatedEngine(2048)
    engine.grow(1600)
    config = GovernorConfig(store="none", policy="random")
    with Governor(engine, source=FakeSource(), config=config) as governor:
        governor.protect(400, 500)
        governor.protect_head(120)
        governor.trim(1.0)
        assert list(engine.ledger.ranges(LIVE)) == [Range(0, 120), Range(400, 500), Range(1344, 1600)]
        governor.unprotect()
        governor.trim(1.0)
        assert list(engine.ledger.ranges(LIVE)) == [Range(0, 120), Range(1344, 1600)]
