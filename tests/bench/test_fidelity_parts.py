"""The parts of the benchmark that need no model: plan, hiding, targets."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.errors import BadInputError
from psikv_bench.fidelity import likelihood, retrieval, targets
from psikv_bench.fidelity.contenders import contenders
from psikv_bench.fidelity.metrics import Compared
from psikv_bench.fidelity.plan import FidelityOptions
from psikv_bench.fidelity.plan import plan as made_plan
from psikv_bench.fidelity.results import Answers, Likelihood, Spike
from psikv_bench.fidelity.tasks import Counts
from psikv_bench.intervals import Interval, Share
from psikv_bench.options import chosen

CONFIG = GovernorConfig()


def options(**given: object) -> FidelityOptions:
    return chosen(FidelityOptions(model="model.gguf", weights="file"), given)


def plan(options: FidelityOptions, config: GovernorConfig, *, quick: bool = False):
    return made_plan(options, config, quick=quick)


# -- plan --------------------------------------------------------------------------------------------------


def test_the_quick_form_compares_the_default_with_window_and_random():
    made = plan(options(), CONFIG, quick=True)
    assert {CONFIG.policy, "window", "random"} <= set(made.policies)
    assert made.ctx == (2048,)
    assert len(made.texts) == 1


def test_random_always_joins_in_under_several_seeds_and_full_is_no_policy():
    made = contenders(["full", "window", "window"], seed=7, seeds=3)
    assert [policy.name for policy in made] == ["window", "random", "random", "random"]
    assert [policy.seed for policy in made[1:]] == [7, 8, 9]


def test_shares_and_lengths_are_sorted_and_taken_once():
    made = plan(options(shares=(0.5, 0.25, 0.5), ctx=(4096, 2048, 2048)), CONFIG)
    assert made.shares == (0.25, 0.5)
    assert made.ctx == (2048, 4096)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"policies": ("windw",)}, "did you mean window"),
        ({"shares": (1.5,)}, "--shares .* is not usable"),
        ({"shares": (0.0,)}, "--shares .* is not usable"),
        ({"shares": (float("nan"),)}, "--shares nan is not usable"),
        ({"shares": (-0.25,)}, "--shares .* is not usable"),
        ({"ctx": (1024,)}, "too short to give up 75%"),
        ({"ctx": (2048, 0)}, "--ctx .* is not usable"),
        ({"texts": ("novel",)}, "unknown text 'novel'"),
        ({"seed": -1}, "--seed -1 is not usable"),
    ],
)
def test_what_can_not_be_measured_is_refused_in_one_line(given, words):
    with pytest.raises(BadInputError, match=words) as caught:
        plan(options(**given), CONFIG)
    assert "\n" not in str(caught.value)


# -- hiding and asking -------------------------------------------------------------------------------------


class Letters:
    """A subject whose tokens are letters, and which reads nothing."""

    opening = (1,)

    def tokens(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def haystack(counts: Counts, length: int = 2048) -> retrieval.Haystack:
    return retrieval.haystack(Letters(), "syntax", counts, length, seed=0)


def test_facts_are_hidden_whole_and_the_text_is_as_long_as_asked():
    hay = haystack(Counts(needles=6, keys=3), length=8192)
    text = "".join(map(chr, hay.tokens))
    assert len(hay.tokens) == 8192
    for asked in hay.asked:
        place = text.index(asked.question.facts[0]) / len(text)
        assert 0.9 * retrieval.FIRST_DEPTH <= place <= 1.1 * retrieval.LAST_DEPTH


def test_greedy_decoding_has_to_give_every_token_of_the_answer():
    asked = haystack(Counts(needles=3)).asked[0]
    answer = f" {asked.question.steps[0][1]}"
    assert "".join(chr(asked.tokens[i]) for i in sorted(asked.answer)) == answer
    logits = np.zeros((len(asked.tokens) - 1, 128), dtype=np.float32)
    logits[np.arange(len(logits)), asked.tokens[1:]] = 1.0
    assert asked.right(logits[asked.stem - 1 :])
    logits[max(asked.answer) - 1, 0] = 2.0
    assert not asked.right(logits[asked.stem - 1 :])


def test_a_text_too_short_to_hide_in_is_refused():
    with pytest.raises(BadInputError, match="too few to hide facts"):
        haystack(Counts(needles=3), length=1_000_000)


def test_a_task_is_beyond_the_model_below_four_fifths():
    def outcomes(task: str, right: int) -> list[retrieval.Outcome]:
        return [retrieval.Outcome(task, "later", "full", 0.0, i < right) for i in range(10)]

    table = retrieval.summed([*outcomes("needle", 8), *outcomes("chain", 7)])
    assert retrieval.able(table) == {"needle"}


# -- distributions -----------------------------------------------------------------------------------------


def compared(kl: float, nll: float) -> Compared:
    return Compared(kl=np.full(32, kl), top1=np.ones(32), nll=np.full(32, nll))


def test_lines_are_over_all_and_by_text_and_seeds_count_as_one():
    made = plan(options(ctx=(2048, 4096), texts=("syntax", "code")), CONFIG)
    runs = [
        likelihood.Run(text, ctx, policy, share, compared(kl, nll))
        for text in made.texts
        for ctx in made.ctx
        for policy, share, kl, nll in (
            ("full", 0.0, 0.0, 1.0),
            ("random", 0.5, 0.1, 1.2),
            ("random", 0.5, 0.3, 1.2),
        )
    ]
    table = likelihood.summed(runs, made)
    mine = {line.text: line for line in table if line.policy == "random"}
    assert set(mine) == {"", "syntax", "code"}
    for found in mine.values():
        assert found.kl.mean == pytest.approx(0.2)
        assert found.perplexity == pytest.approx(np.exp(1.2))
        assert found.perplexity_ratio.mean == pytest.approx(np.exp(0.2))


# -- targets -----------------------------------------------------------------------------------------------


def line(text: str, policy: str, share: float, kl: float, top1: float = 1.0) -> Likelihood:
    one = Interval(1.0, 1.0, 1.0)
    return Likelihood(
        text=text, policy=policy, share=share, kl=Interval(kl, kl, kl),
        top1=Interval(top1, top1, top1), perplexity=2.0, perplexity_ratio=one,
    )  # fmt: skip


def test_the_worst_text_is_judged():
    table = [
        line("a", "hybrid", 0.5, 0.02), line("a", "window", 0.5, 0.03), line("a", "random", 0.5, 0.08),
        line("b", "hybrid", 0.5, 0.05), line("b", "window", 0.5, 0.04), line("b", "random", 0.5, 0.08),
        line("a", "hybrid", 0.25, 0.0, 0.99), line("b", "hybrid", 0.25, 0.0, 0.94),
    ]  # fmt: skip
    random, window, agreement = targets.likelihood_figures(table, "hybrid")
    assert (random.judged, random.passed) == (pytest.approx(0.625), False)
    assert (window.judged, window.passed) == (pytest.approx(1.25), False)
    assert (agreement.judged, agreement.passed) == (0.94, False)


def test_what_was_not_measured_is_not_judged():
    assert list(targets.likelihood_figures([line("a", "hybrid", 0.4, 0.02)], "hybrid")) == []
    assert list(targets.needle_figures([])) == []
    assert list(targets.spike_figures([])) == []


def needles(policy: str, right: int, when: str = "known") -> Answers:
    return Answers(task="needle", when=when, policy=policy, share=0.75, right=Share(right, 20, 0.0, 1.0))


@pytest.mark.parametrize(
    ("window", "attention", "passed"), [(0, 1, False), (0, 2, True), (5, 9, False), (5, 10, True)]
)
def test_twice_as_many_needles_as_window_and_none_of_window_counts_as_one(window, attention, passed):
    (found,) = targets.needle_figures([needles("window", window), needles("attention", attention)])
    assert found.passed is passed


def test_only_a_question_that_was_known_is_judged_and_both_are_said():
    table = [needles("window", 2), needles("attention", 8)]
    table += [needles("window", 2, "later"), needles("attention", 3, "later")]
    assert [found.passed for found in targets.needle_figures(table)] == [True, None]


def test_one_wrong_bit_after_a_restore_is_a_failure():
    kept = Spike(
        policy="window", share=0.5, same_under_pressure=3, same_after_restore=16, tokens=16,
        differing_logits=0,
    )  # fmt: skip
    assert all(found.passed for found in targets.spike_figures([kept]))
    other = msgspec.structs.replace(kept, differing_logits=1)
    assert [found.passed for found in targets.spike_figures([kept, other])] == [False, True]
