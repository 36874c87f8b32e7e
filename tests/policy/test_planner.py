"""The planner's laws: how much goes, in which order, and what never goes."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psi_kv_governor.cache import Capability, Plan, Range, Snapshot, Step, Verb, cells_in
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.simulated import CAPABLE, SimulatedEngine
from psi_kv_governor.policy import POLICIES, get_policy
from psi_kv_governor.policy.planner import Planner

CELL = 1000
CONFIG = GovernorConfig(sink_cells=16, window_cells=32, floor_cells=64, block_cells=16)


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Scene:
    """An engine on a clock that is set, and a planner for it."""

    def __init__(self, *, config: GovernorConfig = CONFIG, policy: str = "window", **engine) -> None:
        self.clock = Clock()
        self.engine = SimulatedEngine(clock=self.clock, **engine)
        self.config = config
        self.said: list[str] = []
        self.planner = Planner(get_policy(policy), self.engine, config, self.said.append)

    def cache(self, *cells: int, idle_s: tuple[float, ...] = (), maskable: bool = True) -> int:
        """A cache with a sequence for each of `cells`, the first of them idle for so long."""
        cache = self.engine.add_cache(
            8192, cell_bytes=CELL, why_not_maskable="" if maskable else "a recurrent model"
        )
        now_s = self.clock.now_s
        for number, many in enumerate(cells):
            self.clock.now_s = now_s - (idle_s[number] if number < len(idle_s) else 0.0)
            self.engine.decode(many, cache=cache.id, sequence=number)
            self.clock.now_s = now_s
        return cache.id

    @property
    def now(self) -> Snapshot:
        return self.engine.snapshot()

    def trim(self, n_bytes: int) -> Plan:
        return self.planner.trim(self.now, n_bytes)


def verbs(plan: Plan) -> list[Verb]:
    return [step.verb for step in plan.steps]


# -- how much ----------------------------------------------------------------------------------------------


@given(
    running=st.lists(st.integers(1, 900), max_size=4),
    idle=st.lists(st.integers(1, 900), max_size=3),
    share=st.floats(0.0, 1.5),
    policy=st.sampled_from(sorted(POLICIES)),
    free=st.integers(0, 100),
)
@settings(deadline=None, max_examples=150)
def test_a_trim_gives_what_was_asked_and_never_more_than_a_block_over(running, idle, share, policy, free):
    scene = Scene(policy=policy)
    scene.cache(*idle, *running, idle_s=tuple(60.0 for _ in idle))
    if free and (idle or running):
        scene.engine.decode(free, sequence=0)
        scene.engine.truncate(idle[0] if idle else running[0], sequence=0)
        if idle:
            scene.engine.caches[1].sequence(0).last_used_s = 900.0
    holdings = scene.planner.holdings(scene.now)
    asked = int(share * holdings.trimmable_bytes)
    before = scene.now
    plan = scene.trim(asked)
    result = scene.engine.apply(plan)
    block = scene.config.block_cells * CELL
    lossless = [rung for rung in plan.steps if rung.verb is Verb.RELEASE]
    over = max([block, *(before.caches[0].free_resident_bytes for _ in lossless)])
    assert result.bytes_returned <= asked + over
    assert result.bytes_returned >= min(asked, holdings.trimmable_bytes)
    assert result.problem == ""
    for step in plan.steps:
        assert list(step.ranges) == sorted(step.ranges)
        assert all(a.stop <= b.start for a, b in zip(step.ranges, step.ranges[1:], strict=False))


@given(
    cells=st.lists(st.integers(1, 1500), min_size=1, max_size=3),
    policy=st.sampled_from(sorted(POLICIES)),
    marks=st.lists(st.tuples(st.integers(0, 1400), st.integers(1, 300)), max_size=3),
    head=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=100)
def test_floor_sinks_window_head_and_marks_stay_however_much_is_asked(cells, policy, marks, head):
    scene = Scene(policy=policy)
    scene.cache(*cells)
    for number in range(len(cells)):
        scene.engine.caches[1].sequence(number).head_cells = head
    for start, length in marks:
        scene.planner.protect(Range(start, start + length), None)
    for _ in range(3):
        scene.engine.apply(scene.trim(1 << 40))
    assert scene.planner.holdings(scene.now).trimmable_bytes == 0
    for one in scene.now.caches[0].sequences:
        live = {position for part in one.live for position in range(part.start, part.stop)}
        whole = set(range(one.next_position))
        assert len(live) >= min(
            one.next_position, max(scene.config.floor_cells, math.ceil(0.2 * one.next_position))
        )
        kept_head = min(head, int(scene.config.head_share * one.next_position))
        assert whole & set(range(max(scene.config.sink_cells, kept_head))) <= live
        assert whole & set(range(one.next_position - scene.config.window_cells, one.next_position)) <= live
        for start, length in marks:
            assert whole & set(range(start, start + length)) <= live


# -- in which order ----------------------------------------------------------------------------------------


def test_what_costs_nothing_goes_before_any_running_cell():
    scene = Scene()
    scene.cache(200, 300, 1000, idle_s=(10.0, 60.0))
    blob = scene.engine.save(5000)
    scene.engine.decode(50, sequence=2)
    scene.engine.truncate(1000, sequence=2)
    plan = scene.trim(1 << 40)
    assert verbs(plan) == [Verb.RELEASE, Verb.PARK, Verb.PARK, Verb.PARK, Verb.MASK]
    assert [step.blob for step in plan.steps] == [None, blob, None, None, None]
    assert [step.sequence for step in plan.steps] == [None, None, 1, 0, 2]  # least recently used first


@given(idle=st.lists(st.floats(2.0, 900.0), min_size=2, max_size=6, unique=True), share=st.floats(0.05, 1.0))
@settings(deadline=None, max_examples=60)
def test_of_idle_sequences_the_least_recently_used_go_first(idle, share):
    scene = Scene()
    scene.cache(*[100] * len(idle), idle_s=tuple(idle))
    plan = scene.trim(int(share * 100 * CELL * len(idle)))
    order = sorted(range(len(idle)), key=lambda number: -idle[number])
    assert [step.sequence for step in plan.steps] == order[: len(plan.steps)]


def test_lossless_bytes_are_told_apart_from_the_rest():
    scene = Scene()
    scene.cache(200, 1000, idle_s=(60.0,))
    held = scene.planner.holdings(scene.now)
    assert (held.lossless_bytes, held.live_bytes) == (200 * CELL, 1200 * CELL)
    assert held.trimmable_bytes == 200 * CELL + (1000 - 200) * CELL  # the floor is a fifth


def test_only_caches_that_can_be_masked_lose_running_cells():
    scene = Scene()
    scene.cache(1000, maskable=False)
    assert scene.planner.holdings(scene.now).trimmable_bytes == 0
    assert scene.trim(1 << 40).steps == ()
    assert scene.planner.why_nothing(scene.now) == "a recurrent model"
    other = scene.cache(1000)
    assert {step.cache for step in scene.trim(1 << 40).steps} == {other}


@pytest.mark.parametrize(
    ("park", "mask", "allowed", "can_evict", "verb"),
    [
        (True, True, False, False, Verb.MASK),
        (True, True, True, True, Verb.MASK),
        (True, False, True, True, None),
        (False, True, False, True, None),  # content is dropped only where somebody said so
        (False, True, True, False, None),
        (False, True, True, True, Verb.EVICT),
    ],
)
def test_content_is_dropped_only_where_it_was_allowed_and_there_is_no_place(
    park, mask, allowed, can_evict, verb
):
    able = msgspec.structs.replace(
        CAPABLE,
        park=Capability(able=park, why="" if park else "no disk"),
        mask=Capability(able=mask, why="" if mask else "no flash attention"),
        evict=Capability(able=can_evict),
    )
    scene = Scene(config=msgspec.structs.replace(CONFIG, evict=allowed), capabilities=able)
    scene.cache(1000)
    held = scene.planner.holdings(scene.now)
    plan = scene.trim(1 << 40)
    assert verbs(plan) == ([verb] if verb else [])
    assert (held.trimmable_bytes > 0) == (verb is not None)
    if verb is None:
        assert scene.planner.why_nothing(scene.now) in {"no disk", "no flash attention"}


@pytest.mark.parametrize("what", ["release", "blobs"])
def test_what_the_engine_cannot_do_is_not_planned(what):
    able = msgspec.structs.replace(CAPABLE, **{what: Capability(able=False, why="not here")})
    scene = Scene(capabilities=able)
    scene.cache(3000)
    scene.engine.truncate(10)
    scene.engine.save(5000)
    steps = [*scene.trim(1 << 40).steps]
    for plan in (scene.planner.release(scene.now), scene.planner.park_blobs(scene.now)):
        steps += plan.steps if plan else ()
    assert scene.engine.apply(Plan(steps=tuple(steps))).problem == ""


# -- back again --------------------------------------------------------------------------------------------


def test_what_scored_highest_comes_back_first():
    scene = Scene(policy="attention", config=msgspec.structs.replace(CONFIG, sink_cells=0, window_cells=0))
    scene.cache(2000)
    scene.engine.apply(scene.trim(1 << 40))
    worth = scene.engine.evidence(1, 0)._attention
    (masked,) = (one.masked for one in scene.now.caches[0].sequences)
    (step,) = scene.planner.restore(scene.now, 400 * CELL).steps
    back = [worth[part.start : part.stop].mean() for part in step.ranges]
    left = [part for part in masked if part not in step.ranges]
    assert cells_in(step.ranges) >= 400
    assert max(worth[part.start : part.stop].min() for part in left) < max(back)
    known = scene.planner._scores[1, 0]
    chosen = {cell for part in step.ranges for cell in range(part.start, part.stop)}
    rest = {cell for part in masked for cell in range(part.start, part.stop)} - chosen
    assert min(known[cell] for cell in chosen) >= max(known[cell] for cell in rest) - 1e-9


def test_a_restore_is_one_slice_that_ends_by_itself():
    scene = Scene()
    scene.cache(8000)
    scene.engine.apply(scene.trim(1 << 40))
    plan = scene.planner.restore(scene.now, 100 * CELL)
    assert plan.deadline_s < 1.0
    result = scene.engine.apply(plan)
    assert 100 * CELL <= result.bytes_back < 101 * CELL


def test_everything_comes_back_in_the_end_whatever_was_known_of_it():
    scene = Scene()
    scene.cache(500, 700)
    part = Range(0, 100)
    scene.engine.apply(Plan(steps=(Step(verb=Verb.MASK, cache=1, sequence=0, ranges=(part,)),)))  # unscored
    scene.engine.apply(scene.trim(1 << 40))
    for _ in range(100):
        scene.engine.apply(scene.planner.restore(scene.now, 1 << 40))
    assert scene.planner.holdings(scene.now).masked_bytes == 0


# -- what changes meanwhile --------------------------------------------------------------------------------


def test_a_sequence_that_ended_since_the_snapshot_does_no_harm():
    scene = Scene()
    scene.cache(1000, 1000)
    before = scene.now
    del scene.engine.caches[1].sequences[0]
    plan = scene.planner.trim(before, 1 << 40)
    assert scene.engine.apply(plan).cells > 0
    assert {step.sequence for step in plan.steps} == {1}


def test_a_sequence_that_shrank_since_the_snapshot_does_no_harm():
    scene = Scene()
    scene.cache(1000)
    before = scene.now
    scene.engine.truncate(100)
    result = scene.engine.apply(scene.planner.trim(before, 1 << 40))
    assert result.cells <= 100
    assert scene.now.caches[0].sequences[0].next_position == 100


def test_what_was_thought_of_caches_that_are_gone_is_forgotten():
    scene = Scene()
    for _ in range(5):
        number = scene.cache(1000)
        scene.engine.apply(scene.trim(1 << 40))
        scene.engine.remove_cache(number)
    scene.cache(1000)
    scene.trim(1 << 40)
    assert len(scene.planner._scores) == 1


def test_a_policy_that_fails_is_somebodys_mistake_and_the_oldest_go(monkeypatch):
    scene = Scene(policy="attention")
    scene.cache(1000)
    monkeypatch.setattr(type(scene.planner.policy), "score", lambda *_: 1 / 0)
    (step,) = scene.trim(160 * CELL).steps
    assert step.ranges == (Range(16, 176),)
    assert "failed (division by zero): the oldest blocks go instead" in scene.said[0]
