"""Positions and rows: whatever is masked, lost, brought back and cropped, rows stand in position order."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from psi_kv_governor.cache import Range, cells_in
from psi_kv_governor.engines.transformers.places import Places, cells_after, first_cells

RANGE = st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda pair: Range(*sorted(pair)))
STEP = st.tuples(st.sampled_from(["grow", "mask", "lose", "unmask", "crop"]), st.lists(RANGE, max_size=3))


@settings(max_examples=200)
@given(st.lists(STEP, max_size=12))
def test_places_are_a_set_of_positions(steps):
    places, state = Places(), {}  # position -> live, masked or lost
    for verb, ranges in steps:
        cells = {position for part in ranges for position in range(part.start, part.stop)}
        if verb == "grow":
            grown = range(places.next_position, places.next_position + len(cells))
            state.update(dict.fromkeys(grown, "live"))
            places.next_position += len(cells)
        elif verb == "crop" and ranges:
            state = {position: what for position, what in state.items() if position < ranges[0].stop}
            places.crop(ranges[0].stop)
        elif verb == "unmask":
            back = {position for position in cells if state.get(position) == "masked"}
            places.unmask(places.masked_part(ranges))
            state.update(dict.fromkeys(back, "live"))
        elif verb in ("mask", "lose"):
            gone = {position for position in cells if state.get(position) == "live"}
            assert cells_in(places.live_part(ranges)) == len(gone)
            (places.mask if verb == "mask" else places.lose)(places.live_part(ranges))
            state.update(dict.fromkeys(gone, "masked" if verb == "mask" else "lost"))
        live = sorted(position for position, what in state.items() if what == "live")
        np.testing.assert_array_equal(places.live_positions(), live)
        assert places.live_cells == len(live)
        assert [places.row_of(position) for position in live] == list(range(len(live)))
        assert cells_in(places.masked) == sum(what == "masked" for what in state.values())
        assert cells_in(places.lost) == sum(what == "lost" for what in state.values())


@given(st.integers(0, 40))
def test_ranges_are_taken_from_their_beginning(cells):
    ranges = [Range(3, 9), Range(12, 13), Range(20, 40)]
    taken = first_cells(ranges, cells)
    assert cells_in(taken) == min(cells, 27)
    rest = cells_after(ranges, taken[-1].stop if taken else 0)
    assert cells_in(rest) == 27 - cells_in(taken)
