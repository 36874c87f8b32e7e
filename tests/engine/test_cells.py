"""The cell map against a naive model: what it would release never covers a live cell."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from psi_kv_governor.engine.llama.cells import CellMap, runs_of
from psi_kv_governor.ledger import LIVE, LOST, SPILLED
from psi_kv_governor.policy.base import Range

N_CELLS = 24
shares = st.floats(0.0, 1.0)


class CellMapMachine(RuleBasedStateMachine):
    """A cache that hands out free cells in any order, as llama.cpp may after evictions."""

    def __init__(self) -> None:
        super().__init__()
        self.map = CellMap(N_CELLS)
        self.places: list[int] = []
        self.cells: list[int] = []
        self.dirty: set[int] = set()
        """Cells whose rows may be resident: written, and not released since."""

    def live(self) -> set[int]:
        return {cell for cell, place in zip(self.cells, self.places, strict=True) if place == LIVE}

    def free(self) -> list[int]:
        occupied = {
            cell for cell, place in zip(self.cells, self.places, strict=True) if place in (LIVE, SPILLED)
        }
        return [cell for cell in range(N_CELLS) if cell not in occupied]

    def pick(self, data: st.DataObject, *among: int) -> Range | None:
        """A run of positions that are all at one of the places `among`."""
        candidates = [p for p, place in enumerate(self.places) if place in among]
        if not candidates:
            return None
        start = data.draw(st.sampled_from(candidates))
        stop = start + 1
        while stop < len(self.places) and self.places[stop] in among and data.draw(st.booleans()):
            stop += 1
        return Range(start, stop)

    @precondition(lambda self: self.free() and len(self.places) < N_CELLS)
    @rule(data=st.data(), again=st.booleans())
    def decode(self, data, again):
        room = min(len(self.free()), N_CELLS - len(self.places))
        cells = data.draw(st.permutations(self.free()))[: data.draw(st.integers(1, room))]
        for _ in range(1 + again):
            self.map.place(len(self.places), np.array(cells, dtype=np.int64))
        self.places += [LIVE] * len(cells)
        self.cells += cells
        self.dirty |= set(cells)

    @rule(share=shares)
    def truncate(self, share):
        length = round(share * len(self.places))
        self.map.truncate(length)
        del self.places[length:], self.cells[length:]

    @rule(data=st.data())
    def park(self, data):
        if (run := self.pick(data, LIVE)) is not None:
            self.map.park(run)
            self.places[run.start : run.stop] = [SPILLED] * run.cells

    @rule(data=st.data())
    def unpark(self, data):
        if (run := self.pick(data, SPILLED)) is not None:
            self.map.unpark(run)
            self.places[run.start : run.stop] = [LIVE] * run.cells
            self.dirty |= set(self.cells[run.start : run.stop])

    @rule(data=st.data())
    def lose(self, data):
        if (run := self.pick(data, LIVE, SPILLED)) is not None:
            self.map.lose(run)
            self.places[run.start : run.stop] = [LOST] * run.cells

    @rule(data=st.data())
    def recompute(self, data):
        if (run := self.pick(data, LOST)) is not None:
            cells = data.draw(st.permutations(self.free()))[: run.cells]
            self.map.place(run.start, np.array(cells, dtype=np.int64))
            self.places[run.start : run.stop] = [LIVE] * run.cells
            self.cells[run.start : run.stop] = cells
            self.dirty |= set(cells)

    @rule(data=st.data())
    def fail_to_restore(self, data):
        if (run := self.pick(data, SPILLED)) is not None:
            self.map.touched(run)
            self.dirty |= set(self.cells[run.start : run.stop])

    @rule()
    def release(self):
        self.map.released()
        self.dirty &= self.live()

    @invariant()
    def the_ledger_agrees(self):
        ledger = self.map.ledger
        assert len(ledger) == len(self.places)
        for place in (LIVE, SPILLED, LOST):
            found = [p for run in ledger.ranges(place) for p in range(*run)]
            assert found == [p for p, here in enumerate(self.places) if here == place]

    @invariant()
    def live_and_spilled_positions_have_their_cells(self):
        for p, place in enumerate(self.places):
            if place != LOST:
                assert self.map.cells(Range(p, p + 1)).tolist() == [self.cells[p]]

    @invariant()
    def what_can_be_released_is_dead_and_complete(self):
        live, covered = self.live(), set()
        for dead_start, dead_stop, start, stop in self.map.returnable().tolist():
            dead = set(range(dead_start, dead_stop))
            assert not dead & live
            assert dead_start == 0 or dead_start - 1 in live  # as wide as it can be: more whole pages
            assert dead_stop == N_CELLS or dead_stop in live
            assert dead_start <= start < stop <= dead_stop
            covered |= set(range(start, stop))
        assert covered == self.dirty - live


CellMapMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestCellMap = CellMapMachine.TestCase


@given(st.lists(st.booleans(), max_size=40))
def test_runs_are_the_runs_of_true(mask):
    covered = [
        i for start, stop in runs_of(np.array(mask, dtype=np.bool_)).tolist() for i in range(start, stop)
    ]
    assert covered == [i for i, here in enumerate(mask) if here]
    assert len(runs_of(np.array(mask, dtype=np.bool_))) == sum(
        here and not before for before, here in zip([False, *mask], mask, strict=False)
    )


def test_a_fresh_map_has_nothing_to_release():
    assert CellMap(8).returnable().shape == (0, 4)


def test_an_entry_that_was_cut_short_counts_as_not_made():
    """Ctrl-C may come between two steps of it. It is made again as long as the ledger does not have it."""

    class CutShortError(Exception):
        pass

    class Cells(list):
        def __array__(self, *_: object, **__: object) -> np.ndarray:
            raise CutShortError

    cells = CellMap(8)
    with pytest.raises(CutShortError):
        cells.place(0, Cells([3, 1]))
    assert len(cells.ledger) == 0
    cells.place(0, np.array([3, 1]))
    assert cells.cells(Range(0, 2)).tolist() == [3, 1]
