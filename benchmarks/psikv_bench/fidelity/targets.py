"""What is asked of the default policy, held against what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from psikv_bench.fidelity.contenders import RANDOM
from psikv_bench.fidelity.results import SCENES, Answers, Likelihood, Rows, Spike
from psikv_bench.figures import Asked, Figure, figure

HALF, QUARTER, MOST = 0.5, 0.25, 0.75
OVER_RANDOM = Asked("<=", 0.5, "max")
OVER_WINDOW = Asked("<=", 1.0, "max")
AGREEMENT = Asked(">=", 0.95, "min")
NEEDLES = Asked(">=", 2.0)
IDENTICAL = Asked("<=", 0, "max")

WINDOW = "window"
LOOKING = ("attention", "hybrid")
"""The policies that can see what a question refers to."""


def figures(rows: Rows, default: str) -> Iterator[Figure]:
    """All for which something was measured, for the policy that is the `default`."""
    yield from likelihood_figures(rows.likelihood, default)
    yield from needle_figures(rows.answers)
    yield from spike_figures(rows.spikes)
    if rows.trims:
        name = "logits of the full cache unlike before, after all restores"
        yield figure(name, "logits", [rows.differing_logits], IDENTICAL, case=f"texts, {rows.trims} trims")


def likelihood_figures(table: Sequence[Likelihood], policy: str) -> Iterator[Figure]:
    """The bounds on `policy`'s divergence and agreement, as far as its rivals and the shares were measured.

    A value for each text: the worst one is judged.
    """
    of = {(line.policy, line.share, line.text): line for line in table if line.text}
    texts = dict.fromkeys(line.text for line in table if line.text)
    for rival, asked in ((RANDOM, OVER_RANDOM), (WINDOW, OVER_WINDOW)):
        pairs = [(of.get((policy, HALF, text)), of.get((rival, HALF, text))) for text in texts]
        ratios = [mine.kl.mean / other.kl.mean for mine, other in pairs if mine and other]
        if ratios:
            yield figure(f"divergence at {HALF:.0%} over {rival}'s", "x", ratios, asked, case=policy)
    agreed = [of[policy, QUARTER, text].top1.mean for text in texts if (policy, QUARTER, text) in of]
    if agreed:
        yield figure(f"top-1 agreement at {QUARTER:.0%}", "share", agreed, AGREEMENT, case=policy)


def needle_figures(table: Sequence[Answers]) -> Iterator[Figure]:
    """Needles against `window`'s, for each policy that can see what a question refers to: with the question
    in the context when cells went, and, for information, asked only afterwards, when nothing pointed to them
    yet. A window that kept none counts as if it had kept one."""
    needles = [line for line in table if (line.task, line.share) == ("needle", MOST)]
    kept = {(line.when, line.policy): line.right for line in needles}
    for when, words in SCENES.items():
        window = kept.get((when, WINDOW))
        for name in LOOKING:
            if window is not None and (when, name) in kept:
                ratio = kept[when, name].mean / (max(window.hits, 1) / window.trials)
                what = f"needles kept at {MOST:.0%} over {WINDOW}'s, {words}"
                yield figure(what, "x", [ratio], NEEDLES if when == "known" else None, case=name)


def spike_figures(spikes: Sequence[Spike]) -> Iterator[Figure]:
    """Everything that was restored against never trimmed: bits and tokens."""
    if spikes:
        bits = [spike.differing_logits for spike in spikes]
        yield figure("logits unlike never trimmed, after restore", "logits", bits, IDENTICAL, case="spike")
        wrong = [spike.tokens - spike.same_after_restore for spike in spikes]
        yield figure("tokens unlike never trimmed, after restore", "tokens", wrong, IDENTICAL, case="spike")
