"""Protection, block cutting, and the order of the selection."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psi_kv_governor.cache import Range, without
from psi_kv_governor.engines.simulated import PaperSequence
from psi_kv_governor.engines.simulated.evidence import PaperEvidence
from psi_kv_governor.policy import Policy, get_policy
from psi_kv_governor.policy import select as select_with_evidence
from psi_kv_governor.policy.select import Protection, head_of, trimmable, why_nothing

WINDOW = get_policy("window")
NOTHING_KNOWN = PaperEvidence(PaperSequence(0, 1), 1)


def select(policy, live, next_position, cells, *, block_cells, **protection):
    return select_with_evidence(
        policy, live, next_position, NOTHING_KNOWN,
        cells=cells, protection=Protection(**protection), block_cells=block_cells,
    )  # fmt: skip


@dataclass(frozen=True)
class Scored(Policy):
    """A policy whose scores are a fixed function of the block number."""

    seed: int
    name = "scored"

    def score(self, blocks, next_position, evidence):
        rng = np.random.default_rng(self.seed)
        return rng.permutation(1000)[[block.start % 1000 for block in blocks]].astype(np.float64)


def positions(ranges) -> set[int]:
    return {position for part in ranges for position in range(part.start, part.stop)}


@st.composite
def lives(draw) -> tuple[list[Range], int]:
    """Disjoint sorted live ranges, and the length of the context."""
    edges = sorted(draw(st.sets(st.integers(0, 900), max_size=12)))
    live = [Range(a, b) for a, b in zip(edges[::2], edges[1::2], strict=False)]
    end = live[-1].stop if live else 0
    return live, end + draw(st.integers(0, 50))


ends = st.fixed_dictionaries({"sink_cells": st.integers(0, 200), "window_cells": st.integers(0, 400)})
blocks = st.integers(1, 130)


def test_the_window_policy_gives_up_the_oldest_first():
    gone = select(WINDOW, [Range(0, 1000)], 1000, 128, sink_cells=64, window_cells=256, block_cells=64)
    assert gone == [Range(64, 192)]


def test_blocks_start_at_multiples_and_the_last_one_is_cut():
    # Sinks end at 30: a block of 34, then one of 64. 64 cells are one block, so the second is cut to 30.
    gone = select(WINDOW, [Range(0, 1000)], 1000, 64, sink_cells=30, window_cells=256, block_cells=64)
    assert gone == [Range(30, 94)]
    # 60 asked for are covered by 64, so 64 may go as well.
    assert gone == select(WINDOW, [Range(0, 1000)], 1000, 60, sink_cells=30, window_cells=256, block_cells=64)


def test_ranges_apart_stay_apart_and_come_in_order():
    live = [Range(500, 564), Range(0, 128), Range(256, 320)]
    gone = select(WINDOW, live, 564, 192, sink_cells=0, window_cells=0, block_cells=64)
    assert gone == [Range(0, 128), Range(256, 320)]


@pytest.mark.parametrize("cells", [0, -5])
def test_nothing_asked_nothing_given(cells):
    assert select(WINDOW, [Range(0, 99)], 99, cells, sink_cells=0, window_cells=0, block_cells=8) == []


def test_scores_of_the_wrong_shape_are_refused():
    class Wrong(Policy):
        name = "wrong"

        def score(self, blocks, next_position, evidence):
            return np.zeros((2, len(blocks)))

    with pytest.raises(ValueError, match="policy wrong scored 4 blocks"):
        select(Wrong(), [Range(0, 32)], 32, 8, sink_cells=0, window_cells=0, block_cells=8)


def test_equal_scores_go_oldest_first():
    class Coarse(Policy):
        name = "coarse"

        def score(self, blocks, next_position, evidence):
            return np.array([block.start // 50 % 3 for block in blocks], dtype=np.float64)

    gone = select(Coarse(), [Range(0, 90_000)], 90_000, 200, sink_cells=0, window_cells=0, block_cells=50)
    assert gone == [Range(start, start + 50) for start in (0, 150, 300, 450)]


@settings(max_examples=150)
@given(lives(), st.integers(1, 1200), ends, blocks, st.integers(0, 99))
def test_a_selection_is_live_unprotected_and_as_large_as_asked(live, cells, ends, block_cells, seed):
    ranges, next_position = live
    gone = select(Scored(seed), ranges, next_position, cells, block_cells=block_cells, **ends)
    free = positions(ranges) & set(range(ends["sink_cells"], max(0, next_position - ends["window_cells"])))
    assert positions(gone) <= free
    assert trimmable(ranges, next_position, Protection(**ends)) == len(free)
    taken = sum(part.cells for part in gone)
    assert taken == len(positions(gone))  # disjoint
    assert min(cells, len(free)) <= taken <= -(-cells // block_cells) * block_cells
    assert all(a.stop < b.start for a, b in pairwise(gone))  # sorted and merged


@settings(max_examples=60)
@given(lives(), ends, blocks, st.integers(0, 99))
def test_a_block_is_the_same_tokens_however_long_the_context_is(live, ends, block_cells, seed):
    ranges, next_position = live
    seen: list[list[Range]] = []

    class Recorder(Scored):
        def score(self, blocks, next_position, evidence):
            seen.append(list(blocks))
            return super().score(blocks, next_position, evidence)

    for longer in (0, 17):
        select(Recorder(seed), ranges, next_position + longer, 1, block_cells=block_cells, **ends)
    for found in seen:
        for block in found:
            assert block.start // block_cells == (block.stop - 1) // block_cells  # never across a multiple
    if len(seen) == 2:
        assert set(seen[0][:-1]) <= set(seen[1])  # only the block at the moving window's edge changes


@settings(max_examples=60)
@given(lives(), ends, blocks, st.integers(0, 99), st.integers(1, 400))
def test_repeated_selections_give_up_everything_and_then_nothing(live, ends, block_cells, seed, cells):
    ranges, next_position = live
    gone = positions(select(Scored(seed), ranges, next_position, cells, block_cells=block_cells, **ends))
    left = sorted(positions(ranges) - gone)
    rest = select(
        Scored(seed), [Range(p, p + 1) for p in left], next_position, 9999, block_cells=block_cells, **ends
    )
    assert not gone & positions(rest)
    assert len(gone) + len(positions(rest)) == trimmable(ranges, next_position, Protection(**ends))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_no_numbers_are_refused(bad):
    class Sick(Policy):
        name = "sick"

        def score(self, blocks, next_position, evidence):
            return np.full(len(blocks), bad)

    with pytest.raises(ValueError, match="policy sick gave a score that is not finite"):
        select(Sick(), [Range(0, 32)], 32, 8, sink_cells=0, window_cells=0, block_cells=8)


def test_what_is_marked_stays_and_cuts_blocks():
    marked = (Range(70, 80), Range(75, 100), Range(500, 9999))
    gone = select(
        WINDOW, [Range(0, 600)], 600, 64, sink_cells=64, window_cells=0, marked=marked, block_cells=64
    )
    assert gone == [Range(64, 70), Range(100, 158)]
    assert trimmable([Range(0, 600)], 600, Protection(64, 0, marked)) == 600 - 64 - 30 - 100


protections = st.builds(
    Protection,
    sink_cells=st.integers(0, 200),
    window_cells=st.integers(0, 400),
    marked=st.lists(
        st.tuples(st.integers(0, 900), st.integers(1, 300)).map(lambda mark: Range(mark[0], sum(mark))),
        max_size=4,
    ).map(tuple),
)


@settings(max_examples=100)
@given(lives(), st.integers(1, 1200), protections, blocks, st.integers(0, 99))
def test_no_mark_is_ever_broken(live, cells, protection, block_cells, seed):
    ranges, next_position = live
    gone = select_with_evidence(
        Scored(seed), ranges, next_position, NOTHING_KNOWN,
        cells=cells, protection=protection, block_cells=block_cells,
    )  # fmt: skip
    assert not positions(gone) & positions(protection.marked)
    free = trimmable(ranges, next_position, protection)
    assert sum(part.cells for part in gone) >= min(cells, free)


@settings(max_examples=100)
@given(st.integers(0, 50), st.integers(1, 50), st.integers(0, 50), st.integers(1, 50))
def test_without_is_the_difference_of_sets(start, length, other_start, other_length):
    part, gone = Range(start, start + length), Range(other_start, other_start + other_length)
    rest = list(without(part, gone))
    assert positions(rest) == positions([part]) - positions([gone])
    assert all(run.cells > 0 for run in rest)


# -- a system prompt that is all there is ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "next_position", "share", "kept"),
    [(0, 1000, 0.5, 0), (300, 1000, 0.5, 300), (900, 1000, 0.5, 500), (900, 1000, 1.0, 900), (10, 0, 0.5, 0)],
)
def test_a_system_prompt_is_protected_up_to_a_share_of_the_context(head, next_position, share, kept):
    assert head_of(head, next_position, share) == kept


def test_where_nothing_may_go_it_is_said_why():
    whole = [Range(0, 1000)]
    all_head = Protection(sink_cells=64, window_cells=256, marked=(Range(0, 1000),))
    assert "all 1000 live cells are protected: 64 first and 256 last" in why_nothing(
        whole, 1000, all_head, 256
    )
    capped = Protection(sink_cells=64, window_cells=256, marked=(Range(0, head_of(1000, 1000, 0.5)),))
    assert why_nothing(whole, 1000, capped, 256) == ""
    assert why_nothing(whole, 1000, capped, 1000) == "the floor of 1000 cells holds: 1000 are live"
    assert why_nothing([], 0, capped, 256) == "the cache is empty"
