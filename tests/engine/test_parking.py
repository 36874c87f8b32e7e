"""The blobs of a sequence against a naive model: which positions are still wanted, and which are lost."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from psi_kv_governor.engine.llama.parking import Parked, ParkingLot
from psi_kv_governor.policy.base import Range
from psi_kv_governor.store.base import BlobTag

END = 40
TAG = BlobTag(model="m", library="l", layout="f16", start=0, stop=END)


class Dropped:
    """A store that only notes what it is told to forget."""

    def __init__(self) -> None:
        self.keys: list[int] = []

    def drop(self, key: int) -> None:
        self.keys.append(key)


def parked_as(blobs: list[Range], store: Dropped) -> ParkingLot:
    lot = ParkingLot()
    for key, blob in enumerate(blobs):
        lot.add(Parked(blob=blob, wanted=blob, tag=TAG, store=store, key=key))
    return lot


def runs_in(lot: ParkingLot) -> list[Range]:
    return [parked.wanted for parked in lot._parked]


def wanted_in(lot: ParkingLot) -> set[int]:
    return {p for run in runs_in(lot) for p in range(*run)}


ranges = st.tuples(st.integers(0, END - 1), st.integers(1, END)).map(
    lambda pair: Range(pair[0], min(END, pair[0] + pair[1]))
)


@st.composite
def disjoint(draw) -> list[Range]:
    edges = sorted(draw(st.sets(st.integers(0, END), min_size=2, max_size=12)))
    pairs = [Range(a, b) for a, b in itertools.pairwise(edges)]
    return draw(st.permutations([pair for pair in pairs if draw(st.booleans())]))


@settings(max_examples=200)
@given(disjoint(), st.lists(ranges, max_size=6))
def test_what_is_dropped_is_no_longer_wanted_and_the_rest_is_or_is_told(blobs, gone):
    store = Dropped()
    lot = parked_as(blobs, store)
    wanted = wanted_in(lot)
    for part in gone:
        # Only where the middle of a run goes, the part after it is lost with it.
        split = [run for run in runs_in(lot) if run.start < part.start and part.stop < run.stop]
        orphans = lot.drop(part)
        assert orphans == [Range(part.stop, run.stop) for run in split]
        wanted -= {p for orphan in orphans for p in range(*orphan)} | set(range(*part))
        assert wanted_in(lot) == wanted
        assert runs_in(lot) == sorted(runs_in(lot))
        assert all(run.cells > 0 for run in runs_in(lot))
    kept = {parked.key for parked in lot._parked}
    assert sorted([*store.keys, *kept]) == list(range(len(blobs)))  # each blob dropped once, or kept


@given(disjoint(), ranges)
def test_first_is_the_lowest_wanted_position_within(blobs, within):
    lot = parked_as(blobs, Dropped())
    hits = [blob for blob in blobs if set(range(*blob)) & set(range(*within))]
    found = lot.first(within)
    assert (found.blob if found else None) == min(hits, default=None)
    found = lot.first()
    assert (found.blob if found else None) == min(blobs, default=None)


@given(disjoint(), st.lists(ranges, min_size=1, max_size=6))
def test_what_came_back_may_be_parked_again_in_another_blob(blobs, parts):
    """The new blob may begin where an old one did, or within it: what is wanted decides which is first."""
    store = Dropped()
    lot = parked_as(blobs, store)
    for key, part in enumerate(parts, start=len(blobs)):
        lot.drop(part)  # it came back, or was cut off ...
        lot.add(Parked(blob=part, wanted=part, tag=TAG, store=store, key=key))  # ... and goes again
        assert runs_in(lot) == sorted(runs_in(lot))
        assert lot.first().wanted == min(runs_in(lot))
