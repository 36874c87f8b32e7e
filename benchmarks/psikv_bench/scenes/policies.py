"""What policies cost: scoring a context by its keys, and sampling attention while it is decoded.

Both are held against one decoded token of the same context, by turns in one context, so that neither the
machine's drift nor the place of the buffers in memory tells for one of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Literal

from msgspec import Meta

from psi_kv_governor.policy import Range, get_policy
from psi_kv_governor.sandbox.text import prompt_tokens
from psikv_bench.figures import Asked, Figure, figure
from psikv_bench.machine import cores
from psikv_bench.messages import Setup
from psikv_bench.model import Context
from psikv_bench.options import Options
from psikv_bench.record import Recorder, Report
from psikv_bench.scene import Scene

KEY_SCORES = Asked("<=", 1.0)
"""Time of scoring over the time of one decoded token."""
SAMPLING = Asked(">=", 0.98)
"""Decode speed with sampling over the speed without."""

_KEY_POLICIES = ("keynorm", "keydiff")
_BLOCK_CELLS = 64
_TOKENS = 32
"""Decoded in one turn: of these four are sampled."""

Contexts = tuple[tuple[Literal["f16", "q8_0"], int], ...]
_FULL: Contexts = (("f16", 1024), ("f16", 8192), ("q8_0", 8192))
# A prompt of 8,192 tokens takes minutes; scores and tokens both take half as long with half of it.
_QUICK: Contexts = (("f16", 1024), ("q8_0", 2048))


class PoliciesOptions(Options, frozen=True, kw_only=True):
    """How much is measured."""

    rounds: Annotated[int, Meta(ge=1, description="Of scores, and of turns with sampling and without.")] = 60


def run(recorder: Recorder[PoliciesOptions]) -> Report:
    """Measure every context. Raises PsiKvError where the model can't be measured."""
    threads = recorder.options.threads or 1  # with as many as cores, ggml's threads spin for each other
    figures: list[Figure] = []
    for cache, tokens in _QUICK if recorder.quick else _FULL:
        setup = Setup(
            variant="psi", model=recorder.options.model, auto=False, cache=cache, threads=threads,
            prefill_threads=cores(),
        )  # fmt: skip
        with _Filled(setup, tokens, recorder) as filled:
            figures += _figures(filled, recorder)
    return recorder.save(recorder.report(figures, [threads]))


class _Filled(Context):
    """A governed context full of text, whose evidence is gathered."""

    def __init__(self, setup: Setup, tokens: int, recorder: Recorder[PoliciesOptions]) -> None:
        super().__init__(setup, tokens + 256)
        self.case = f"{setup.cache}, {tokens:,} tokens"
        self._tokens = tokens
        self.collect(frozenset({"key_norms", "key_diffs", "attention"}))
        self._text = prompt_tokens(self.llm, tokens)
        recorder.say(f"{self.case}: decoding the prompt", new=True)
        self.read(self._text)

    def decode(self, count: int) -> float:
        """Decode so many tokens one by one, and take them out again; gives the seconds of the decoding."""
        began_s = time.perf_counter()
        for token in self._text[:count]:
            self.llm.eval([token])
        seconds = time.perf_counter() - began_s
        self.cut(self._tokens)
        return seconds

    def score(self, name: str) -> float:
        """Score every block by the policy `name`; gives the seconds."""
        starts = range(0, self._tokens, _BLOCK_CELLS)
        blocks = [Range(start, min(start + _BLOCK_CELLS, self._tokens)) for start in starts]
        began_s = time.perf_counter()
        get_policy(name).score(blocks, self._tokens, self.evidence)
        return time.perf_counter() - began_s


def _figures(filled: _Filled, recorder: Recorder[PoliciesOptions]) -> Iterator[Figure]:
    """In each round turns with sampling and without, a token, and the scores of each policy."""
    score_s: dict[str, list[float]] = {name: [] for name in _KEY_POLICIES}
    turn_s: dict[bool, list[float]] = {False: [], True: []}
    token_s = []
    filled.sample(True)
    filled.decode(_TOKENS)
    for number in range(recorder.options.rounds):
        recorder.say(f"{filled.case}: round {number + 1} of {recorder.options.rounds}")
        for sampled in (False, True) if number % 2 == 0 else (True, False):
            filled.sample(sampled)
            turn_s[sampled].append(filled.decode(_TOKENS))
        filled.sample(False)
        token_s.append(filled.decode(1))
        for name, seconds in score_s.items():
            seconds.append(filled.score(name))
    yield figure("one decoded token", "ms", [1e3 * seconds for seconds in token_s], case=filled.case)
    for name, scores_s in score_s.items():
        ratios = [score / token for score, token in zip(scores_s, token_s, strict=True)]
        yield figure(f"scoring by {name}", "ms", [1e3 * score for score in scores_s], case=filled.case)
        yield figure(f"scoring by {name} over a token", "x", ratios, KEY_SCORES, case=filled.case)
    ratios = [without / with_it for without, with_it in zip(turn_s[False], turn_s[True], strict=True)]
    yield figure("sampled over unsampled speed", "x", ratios, SAMPLING, case=filled.case)
    yield figure("sampled", "tokens/s", [_TOKENS / seconds for seconds in turn_s[True]], case=filled.case)


SCENE = Scene(
    about="What scoring a context by its keys and sampling attention cost, over one decoded token.",
    options=PoliciesOptions(),
    quick=PoliciesOptions(rounds=12),
    run=run,
    examples=("psi-kv bench policies --quick",),
)
