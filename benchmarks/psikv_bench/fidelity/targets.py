"""What is asked of the policies, held against what was measured: for the default, and for every other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from psikv_bench.fidelity.contenders import RANDOM
from psikv_bench.fidelity.results import Likelihood, Retrieval, Speed, Spike, When
from psikv_bench.figures import Asked, Figure, figure
from psikv_bench.intervals import Share

HALF, QUARTER, MOST = 0.5, 0.25, 0.75
OVER_RANDOM = Asked("<=", 0.5, "max")
OVER_WINDOW = Asked("<=", 1.0, "max")
AGREEMENT = Asked(">=", 0.95, "min")
NEEDLES = Asked(">=", 2.0)
IDENTICAL = Asked("<=", 0, "max")
FASTER = Asked("<", 1.0)

WINDOW = "window"
LOOKING = ("attention", "hybrid")
"""The policies that can see what a question refers to."""
SCENES: dict[When, str] = {"known": "question known", "later": "asked after"}
"""When a question came, in words."""


def likelihood_figures(table: Sequence[Likelihood], policy: str) -> Iterator[Figure]:
    """The bounds on `policy`'s divergence and agreement, as far as its rivals and the shares were measured.

    A value for each text: the worst one is judged.
    """
    half = _by_text(table, policy, HALF)
    for rival, asked in ((RANDOM, OVER_RANDOM), (WINDOW, OVER_WINDOW)):
        other = _by_text(table, rival, HALF)
        ratios = [line.kl.mean / other[text].kl.mean for text, line in half.items() if text in other]
        if ratios:
            yield figure(f"divergence at {HALF:.0%} over {rival}'s", "x", ratios, asked, case=policy)
    quarter = _by_text(table, policy, QUARTER)
    if quarter:
        agreed = [line.top1.mean for line in quarter.values()]
        yield figure(f"top-1 agreement at {QUARTER:.0%}", "share", agreed, AGREEMENT, case=policy)


def _by_text(table: Sequence[Likelihood], policy: str, share: float) -> dict[str, Likelihood]:
    """The lines over all lengths of context, by text."""
    return {
        line.text: line
        for line in table
        if line.text and not line.ctx and (line.policy, line.share) == (policy, share)
    }


def needle_figures(table: Sequence[Retrieval]) -> Iterator[Figure]:
    """Needles against `window`'s, for each policy that can see what a question refers to: with the question
    in the context when cells went, and, for information, asked only afterwards, when nothing pointed to them
    yet."""
    kept = {(line.when, line.policy): line.all for line in table if _is_needle(line)}
    for when, words in SCENES.items():
        window = kept.get((when, WINDOW))
        for name in LOOKING:
            if window is not None and (when, name) in kept:
                ratio = _over(kept[when, name], window)
                what = f"needles kept at {MOST:.0%} over {WINDOW}'s, {words}"
                yield figure(what, "x", [ratio], NEEDLES if when == "known" else None, case=name)


def _is_needle(line: Retrieval) -> bool:
    return (line.task, line.share) == ("needle", MOST)


def _over(kept: Share, window: Share) -> float:
    """How many times as many; a window that kept none counts as if it had kept one."""
    return kept.mean / (max(window.hits, 1) / window.trials)


def exact_figures(spikes: Sequence[Spike], differing_logits: int | None) -> Iterator[Figure]:
    """Everything that was restored against never trimmed: bits and tokens."""
    if spikes:
        bits = [spike.differing_logits for spike in spikes]
        yield figure("logits unlike never trimmed, after restore", "logits", bits, IDENTICAL, case="spike")
        wrong = [spike.tokens - spike.same_after_restore for spike in spikes]
        yield figure("tokens unlike never trimmed, after restore", "tokens", wrong, IDENTICAL, case="spike")
    if differing_logits is not None:
        name = "logits of the full cache unlike before, after all restores"
        yield figure(name, "logits", [differing_logits], IDENTICAL, case="texts")


def speed_figures(speed: Speed | None) -> Iterator[Figure]:
    """Time of a token after half was given up over that of the full cache, turn by turn."""
    if speed is not None:
        ratios = [trimmed / full for full, trimmed in zip(speed.full_s, speed.trimmed_s, strict=True)]
        name = f"time of a token after {HALF:.0%} over the full cache's"
        yield figure(name, "x", ratios, FASTER, case=f"{speed.policy}, {speed.ctx:,} tokens")
