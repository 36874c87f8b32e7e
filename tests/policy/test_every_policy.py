"""One matrix that every policy has to pass, and what each of them is about."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from psi_kv_governor.cache import Range
from psi_kv_governor.engines.simulated import PaperSequence
from psi_kv_governor.engines.simulated.evidence import PaperEvidence
from psi_kv_governor.errors import BadInputError
from psi_kv_governor.policy import POLICIES, get_policy, select
from psi_kv_governor.policy.hybrid import WANTED
from psi_kv_governor.policy.random import Random
from psi_kv_governor.policy.registry import about
from psi_kv_governor.policy.select import Protection

LENGTH = 1000
BLOCKS = [Range(start, start + 50) for start in range(100, 700, 50)]


def evidence_of(length: int = LENGTH) -> PaperEvidence:
    sequence = PaperSequence(0, 2 * LENGTH)
    for _ in range(0, length, 100):  # a prompt's batches: each arrives at once
        sequence.decode(100, 0.0)
    return PaperEvidence(sequence, 2 * LENGTH)


class Told(PaperEvidence):
    """Evidence with one value a position set by hand; NaN everywhere else."""

    def __init__(self, kind: str, values: dict[int, float]) -> None:
        super().__init__(PaperSequence(0, LENGTH), LENGTH)
        told = np.full(LENGTH, np.nan)
        for position, value in values.items():
            told[position] = value
        setattr(self, kind, lambda part: told[part.start : part.stop])


def order(name: str, evidence: PaperEvidence, blocks: list[Range] = BLOCKS) -> list[int]:
    """First positions of the blocks, in the order in which they go."""
    scores = get_policy(name).score(blocks, LENGTH, evidence)
    return [blocks[i].start for i in np.argsort(scores, kind="stable")]


@pytest.mark.parametrize("name", POLICIES)
class TestEvery:
    def test_it_has_a_name_a_source_and_a_line_of_its_own(self, name):
        policy = get_policy(name)
        assert policy.name == name
        assert policy.source
        assert 20 < len(about(type(policy))) < 80
        assert about(type(policy)).endswith(".")

    def test_it_is_a_frozen_dataclass_with_defaults(self, name):
        policy = get_policy(name)
        assert dataclasses.is_dataclass(policy)
        assert policy == get_policy(name)
        with pytest.raises(dataclasses.FrozenInstanceError):
            policy.anything = 1

    @pytest.mark.parametrize("blocks", [BLOCKS, BLOCKS[::-1], BLOCKS[:1], [Range(64, 128), Range(640, 641)]])
    def test_its_scores_are_finite_one_a_block_and_the_same_again(self, name, blocks):
        evidence = evidence_of()
        scores = get_policy(name).score(blocks, LENGTH, evidence)
        assert scores.shape == (len(blocks),)
        assert scores.dtype == np.float64
        assert np.isfinite(scores).all()
        assert np.array_equal(scores, get_policy(name).score(blocks, LENGTH, evidence))

    def test_its_scores_do_not_depend_on_the_order_in_which_blocks_are_asked(self, name):
        evidence = evidence_of()
        forth = get_policy(name).score(BLOCKS, LENGTH, evidence)
        back = get_policy(name).score(BLOCKS[::-1], LENGTH, evidence)
        assert np.array_equal(forth, back[::-1])

    def test_it_scores_also_where_nothing_is_known(self, name):
        nothing = PaperEvidence(PaperSequence(0, LENGTH), LENGTH)
        assert np.isfinite(get_policy(name).score(BLOCKS, LENGTH, nothing)).all()
        if name != "random":
            assert order(name, nothing) == [block.start for block in BLOCKS]

    @pytest.mark.parametrize("cells", [1, 64, 300, 5000])
    def test_no_protection_is_ever_broken(self, name, cells):
        protection = Protection(sink_cells=70, window_cells=130, marked=(Range(200, 333), Range(400, 401)))
        gone = select(
            get_policy(name), [Range(0, 350), Range(390, LENGTH)], LENGTH, evidence_of(),
            cells=cells, protection=protection, block_cells=64,
        )  # fmt: skip
        here = {position for part in gone for position in range(*part)}
        assert not here & {*range(70), *range(870, LENGTH), *range(200, 333), 400, *range(350, 390)}
        assert len(here) >= min(cells, LENGTH - 70 - 130 - 133 - 1 - 40)

    def test_a_block_keeps_its_score_when_the_context_grows(self, name):
        sequence = PaperSequence(0, 2 * LENGTH)
        sequence.decode(LENGTH, 0.0)
        evidence = PaperEvidence(sequence, 2 * LENGTH)
        before = get_policy(name).score(BLOCKS, LENGTH, evidence)
        sequence.decode(100, 1.0)
        assert np.array_equal(before, get_policy(name).score(BLOCKS, LENGTH + 100, evidence))


def test_the_window_goes_oldest_first_whatever_is_known():
    assert order("window", evidence_of()) == [block.start for block in BLOCKS]


def test_fifo_is_the_window_until_something_comes_in_anew():
    assert order("fifo", evidence_of()) == order("window", evidence_of())
    came = {position: float(position) for position in range(LENGTH)}
    told = Told("arrivals", {**came, **dict.fromkeys(range(100, 200), 5000.0)})
    assert order("fifo", told) == [*range(200, 700, 50), 100, 150]


def test_fifo_counts_a_block_with_its_newest_cell():
    came = {position: float(position) for position in range(LENGTH)}
    assert order("fifo", Told("arrivals", {**came, 149: 5000.0}))[-1] == 100


def test_lru_lets_the_longest_unused_go():
    used = {position: 1.0 for block in BLOCKS for position in range(*block)}
    told = Told("last_used", {**used, 120: 9.0, 510: 7.0})
    assert order("lru", told)[-2:] == [500, 100]


def test_random_follows_its_seed_and_nothing_else():
    evidence = evidence_of()
    one, same, other = (Random(seed).score(BLOCKS, LENGTH, evidence) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert np.array_equal(one[3:], Random(1).score(BLOCKS[3:], LENGTH, evidence))
    many = [Range(start, start + 1) for start in range(5000)]
    assert abs(Random(3).score(many, 5000, evidence).mean() - 0.5) < 0.02


def test_random_refuses_a_seed_below_zero():
    with pytest.raises(BadInputError, match="the seed -1 of the policy random is not usable: give 0 or more"):
        Random(-1)


@pytest.mark.parametrize(
    ("name", "kind", "dull", "important"),
    [
        ("keynorm", "key_norms", 1.0, 0.4),
        ("keydiff", "key_diffs", -0.9, -0.1),
        ("attention", "attention", 0.1, 8.0),
    ],
)
def test_a_few_important_tokens_save_their_block(name, kind, dull, important):
    """Three of fifty: a fact in a few words is not lost among dull ones."""
    values = {position: dull for block in BLOCKS for position in range(*block)}
    few = dict.fromkeys(range(230, 233), important)
    assert order(name, Told(kind, {**values, **few}))[-1] == 200


def test_hybrid_spares_what_a_question_has_just_asked_for():
    values = {position: 0.5 for block in BLOCKS for position in range(*block)}
    told = Told("attention", values)
    assert order("hybrid", told)[0] == 100
    asked = np.full(LENGTH, np.nan)
    asked[100:150] = WANTED  # recall brought it back: nobody has looked at it for long
    asked[150:200] = 0.9 * WANTED
    told.demand = lambda part: asked[part.start : part.stop]
    assert order("hybrid", told)[0] == 150
    assert 100 in order("hybrid", told)[-2:]  # with the newest


def test_hybrid_scores_an_engine_that_knows_of_no_demand_as_before():
    class Older(PaperEvidence):
        demand = None

        def why_not(self, kind):
            return "recall is off" if kind == "demand" else super().why_not(kind)

    older = Older(PaperSequence(0, LENGTH), LENGTH)
    assert order("hybrid", older) == order("hybrid", PaperEvidence(PaperSequence(0, LENGTH), LENGTH))


@pytest.mark.parametrize("name", ["keynorm", "keydiff", "attention"])
@pytest.mark.parametrize("share", [0.0, -1.0, 1.01, float("nan")])
def test_a_top_share_that_makes_no_sense_is_refused(name, share):
    with pytest.raises(BadInputError, match=f"top_share = .* of the policy {name} is not usable"):
        POLICIES[name](top_share=share)


def test_hybrid_keeps_the_recent_and_the_attended_by_turns():
    """Attention falls with the position here: both ends stay, and the middle goes first."""
    looked_at = {position: 1000.0 - position for block in BLOCKS for position in range(*block)}
    gone = order("hybrid", Told("attention", looked_at))
    assert set(gone[:2]) == {350, 400}
    assert set(gone[-2:]) == {100, 650}


def test_one_attended_block_is_an_exception_to_the_window():
    looked_at = {position: float(position) for block in BLOCKS for position in range(*block)}
    few = dict.fromkeys(range(130, 133), 9000.0)
    gone = order("hybrid", Told("attention", {**looked_at, **few}))
    window = [block.start for block in BLOCKS]
    assert gone[-1] == 100 or gone[-2] == 100
    assert [start for start in gone if start != 100] == window[1:]


def test_hybrid_goes_by_keys_where_attention_is_unknown():
    norms = {position: 1.0 for block in BLOCKS for position in range(*block)}
    told = Told("key_norms", {**norms, **dict.fromkeys(range(200, 250), 0.2)})
    told.attention = Told("attention", {}).attention
    assert 200 in order("hybrid", told)[-2:]
