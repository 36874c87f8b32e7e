"""The simulated engine keeps the contract: it does what it is told, and says truly what was done."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psi_kv_governor.cache import Capability, Plan, Range, SequenceState, Step, Verb, cells_in
from psi_kv_governor.engines import engines
from psi_kv_governor.engines.simulated import CAPABLE, SimulatedEngine
from psi_kv_governor.errors import EngineError

CELL = 1000


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def spend(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine(clock) -> SimulatedEngine:
    """A cache of 1,000 cells with two sequences: one idle for a minute, one running."""
    made = SimulatedEngine(clock=clock, spend=clock.spend)
    made.add_cache(1000, cell_bytes=CELL)
    made.decode(200, sequence=1)
    clock.now_s += 60.0
    made.decode(300, sequence=0)
    return made


def sequence(engine: SimulatedEngine, number: int = 0) -> SequenceState:
    (cache,) = engine.snapshot().caches
    return next(one for one in cache.sequences if one.id == number)


def do(engine: SimulatedEngine, *steps: Step, **limits):
    return engine.apply(Plan(steps=steps, **limits))


def step(
    verb: Verb, *ranges: Range, sequence: int | None = 0, cache: int = 1, blob: int | None = None
) -> Step:
    return Step(verb=verb, cache=cache, sequence=sequence, ranges=ranges, blob=blob)


def test_what_is_decoded_is_live_resident_and_dirty(engine):
    state = sequence(engine)
    assert (state.next_position, state.live, state.running) == (300, (Range(0, 300),), True)
    assert (state.parked_bytes, state.dirty_bytes) == (0, 300 * CELL)
    assert not sequence(engine, 1).running
    assert engine.snapshot().caches[0].resident_bytes == 500 * CELL


def test_a_parked_sequence_is_read_back_by_decoding_it(engine):
    result = do(engine, step(Verb.PARK, sequence=1))
    assert (result.cells, result.bytes_returned, result.written_bytes) == (200, 200 * CELL, 200 * CELL)
    assert (sequence(engine, 1).parked_bytes, sequence(engine, 1).live_cells) == (200 * CELL, 200)
    engine.decode(1, sequence=1)
    assert (sequence(engine, 1).parked_bytes, sequence(engine, 1).affected) == (0, 0)


def test_what_is_masked_comes_back_in_place_and_is_not_written_twice(engine):
    parts = (Range(10, 20), Range(100, 150))
    masked = do(engine, step(Verb.MASK, *parts))
    assert (masked.cells, masked.masked, masked.bytes_returned) == (60, 60, 60 * CELL)
    assert sequence(engine).masked == parts
    engine.decode(5)
    assert (sequence(engine).masked, sequence(engine).affected) == (parts, 5)
    back = do(engine, step(Verb.UNMASK, *parts))
    assert (back.cells, back.bytes_back, back.bytes_returned) == (60, 60 * CELL, 0)
    assert sequence(engine).live == (Range(0, 305),)
    assert do(engine, step(Verb.MASK, *parts)).written_bytes == 0


def test_write_behind_leaves_nothing_to_write_later(engine):
    written = do(engine, step(Verb.WRITE_BEHIND))
    assert (written.cells, written.written_bytes, written.bytes_returned) == (0, 300 * CELL, 0)
    assert sequence(engine).dirty_bytes == 0
    assert do(engine, step(Verb.MASK, Range(0, 100))).written_bytes == 0


def test_cells_nobody_uses_stay_resident_until_they_are_released(engine):
    engine.truncate(100)
    assert engine.snapshot().caches[0].free_resident_bytes == 200 * CELL
    assert do(engine, step(Verb.RELEASE, sequence=None)).bytes_returned == 200 * CELL
    assert engine.snapshot().caches[0].resident_bytes == 300 * CELL


def test_blobs_are_parked_one_by_one(engine):
    first, second = engine.save(5000), engine.save(7000, kind="checkpoint")
    assert do(engine, step(Verb.PARK, sequence=None, blob=first)).bytes_returned == 5000
    assert [blob.parked for blob in engine.snapshot().caches[0].blobs] == [True, False]
    assert do(engine, step(Verb.PARK, sequence=None, blob=first)).bytes_returned == 0
    assert do(engine, step(Verb.UNPARK, sequence=None, blob=first)).bytes_back == 5000
    assert engine.snapshot().caches[0].blobs[1].id == second


def test_it_stops_where_the_bytes_or_the_time_are_up(engine):
    result = do(engine, step(Verb.MASK, Range(0, 100)), step(Verb.MASK, Range(100, 200)), max_bytes=50_500)
    assert (result.cells, result.done) == (51, False)
    result = do(engine, step(Verb.UNMASK), deadline_s=0.0)
    assert (result.cells, result.done) == (0, False)


@pytest.mark.parametrize(
    "gone",
    [step(Verb.PARK, cache=9), step(Verb.MASK, sequence=9), step(Verb.PARK, sequence=None, blob=9),
     step(Verb.MASK, Range(5000, 6000)), step(Verb.UNMASK, Range(0, 300))],
)  # fmt: skip
def test_what_is_gone_meanwhile_does_no_harm(engine, gone):
    before = engine.snapshot().caches
    assert do(engine, gone) == msgspec.structs.replace(do(engine), seconds=0.0)
    assert engine.snapshot().caches == before


def test_a_full_place_takes_what_fits_and_says_so(clock):
    engine = SimulatedEngine(clock=clock, place_limit_bytes=100 * CELL)
    engine.add_cache(1000, cell_bytes=CELL)
    engine.decode(300)
    result = do(engine, step(Verb.MASK))
    assert (result.cells, sequence(engine).live_cells) == (100, 200)
    assert "full" in result.problem


def test_what_it_cannot_do_it_says_and_leaves(engine):
    engine = SimulatedEngine(
        capabilities=msgspec.structs.replace(CAPABLE, park=Capability(able=False, why="there is no disk"))
    )
    engine.add_cache(100, why_not_maskable="a recurrent model")
    engine.decode(50)
    assert do(engine, step(Verb.PARK)).problem == "there is no disk"
    assert do(engine, step(Verb.MASK)).problem == "there is no disk"
    assert do(engine, step(Verb.EVICT)).problem != ""
    assert sequence(engine).live_cells == 50


def test_a_closed_engine_has_its_masks_off_and_answers_nothing(engine):
    do(engine, step(Verb.MASK, Range(0, 100)))
    engine.close()
    engine.close()
    assert engine.caches[1].sequence(0).counts.masked == 0
    for call in (engine.snapshot, lambda: do(engine), lambda: engine.evidence(1, 0)):
        with pytest.raises(EngineError, match="closed"):
            call()


VERBS = st.sampled_from([Verb.PARK, Verb.MASK, Verb.EVICT, Verb.UNMASK, Verb.UNPARK, Verb.WRITE_BEHIND])


@given(
    acts=st.lists(
        st.tuples(VERBS, st.integers(0, 2), st.integers(0, 120), st.integers(1, 60), st.integers(0, 20)),
        max_size=30,
    )
)
@settings(max_examples=60)
def test_every_byte_is_accounted_for_whatever_is_asked(acts):
    able = msgspec.structs.replace(CAPABLE, evict=Capability(able=True))
    engine = SimulatedEngine(capabilities=able)
    engine.add_cache(4096, cell_bytes=CELL)
    for number in range(3):
        engine.decode(100, sequence=number)
    resident = engine.snapshot().caches[0].resident_bytes
    for verb, number, start, length, more in acts:
        result = do(engine, step(verb, Range(start, start + length), sequence=number))
        resident += result.bytes_back - result.bytes_returned
        cache = engine.snapshot().caches[0]
        assert cache.resident_bytes == resident
        if more:
            engine.decode(more, sequence=number)
            resident = engine.snapshot().caches[0].resident_bytes
        for one in engine.snapshot().caches[0].sequences:
            assert cells_in((*one.live, *one.masked, *one.lost)) == one.next_position


def test_engines_are_found_by_entry_point():
    assert {"llama", "simulated"} <= set(engines())
    assert engines()["simulated"].load().SimulatedEngine is SimulatedEngine
