"""What policies cost: scoring a context by its keys, and sampling attention while it is decoded.

Both are held against one decoded token of the same context, by turns in one context, so that neither the
machine's drift nor the place of the buffers in memory tells for one of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from psi_kv_governor.bench.record import Asked, Figure, Options, Recorder, Report, Say, cores, figure
from psi_kv_governor.bench.twins import CacheType, engine_of, ggml_type, prefill, prompt_tokens
from psi_kv_governor.policy import Range, get_policy

KEY_SCORES = Asked("<=", 1.0)
"""Time of scoring over the time of one decoded token."""
SAMPLING = Asked(">=", 0.98)
"""Decode speed with sampling over the speed without."""

_KEY_POLICIES = ("keynorm", "keydiff")
_BLOCK_CELLS = 64


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured."""

    contexts: tuple[tuple[CacheType, int], ...]
    """Type of the cache, and tokens in it."""
    pairs: int
    tokens: int = 32
    """Decoded in one turn: of these four are sampled."""
    score_repeats: int


FULL = Plan(contexts=(("f16", 1024), ("f16", 8192), ("q8_0", 8192)), pairs=60, score_repeats=25)
# A prompt of 8,192 tokens takes minutes; scores and tokens both take half as long with half of it.
QUICK = Plan(contexts=(("f16", 1024), ("q8_0", 2048)), pairs=12, score_repeats=9)


def run(options: Options, say: Say = lambda doing: None) -> Report:
    """`psi-kv bench policies`. Raises PsiKvError where the model can't be measured."""
    plan = QUICK if options.quick else FULL
    if options.repeats is not None:
        plan = msgspec.structs.replace(plan, pairs=options.repeats, score_repeats=options.repeats)
    threads = options.threads or 1  # with as many as cores, ggml's threads spin for each other
    recorder = Recorder("policies", options, [threads])
    return recorder.report(list(measure(options, plan, threads, say)))


def measure(options: Options, plan: Plan, threads: int, say: Say) -> Iterator[Figure]:
    """The figures of every context of `plan`."""
    for cache, tokens in plan.contexts:
        with _Context(options.model, cache, tokens, threads, say) as context:
            yield from _key_figures(context, plan, say)
            yield from _sampling_figures(context, plan, say)


class _Context:
    """A governed context full of text that acts by hand only. A context manager."""

    def __init__(self, model: Path, cache: CacheType, tokens: int, threads: int, say: Say) -> None:
        from psi_kv_governor import GovernedLlama  # before llama_cpp: see native.load_before_llama_cpp

        self.case = f"{cache}, {tokens:,} tokens"
        self.tokens = tokens
        self._llm: Any = GovernedLlama(
            str(model), auto=False, n_ctx=tokens + 256, n_threads=threads, n_threads_batch=cores(),
            type_k=ggml_type(cache), type_v=ggml_type(cache), verbose=False,
        )  # fmt: skip
        try:
            self.evidence: Any = engine_of(self._llm).evidence
            self.evidence.collect(frozenset({"key_norms", "key_diffs", "attention"}))
            self._text = prompt_tokens(self._llm, tokens)
            prefill(self._llm, self._text, say, self.case)
        except BaseException:
            self._llm.close()
            raise

    def decode(self, count: int) -> float:
        """Decode so many tokens one by one, and take them out again; gives the seconds of the decoding."""
        began_s = time.perf_counter()
        for token in self._text[:count]:
            self._llm.eval([token])
        seconds = time.perf_counter() - began_s
        self._llm.n_tokens = self.tokens
        self._llm._ctx.kv_cache_seq_rm(0, self.tokens, -1)
        return seconds

    def score(self, name: str) -> float:
        """Score every block by the policy `name`; gives the seconds."""
        starts = range(0, self.tokens, _BLOCK_CELLS)
        blocks = [Range(start, min(start + _BLOCK_CELLS, self.tokens)) for start in starts]
        began_s = time.perf_counter()
        get_policy(name).score(blocks, self.tokens, self.evidence)
        return time.perf_counter() - began_s

    def __enter__(self) -> _Context:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._llm.close()


def _key_figures(context: _Context, plan: Plan, say: Say) -> Iterator[Figure]:
    context.evidence._sampler.pause(True)
    context.decode(2)
    token_s = []
    score_s: dict[str, list[float]] = {name: [] for name in _KEY_POLICIES}
    for number in range(plan.score_repeats):
        say(f"{context.case}: scores, {number + 1} of {plan.score_repeats}")
        token_s.append(context.decode(1))
        for name in _KEY_POLICIES:
            score_s[name].append(context.score(name))
    yield figure("one decoded token", "ms", [1e3 * seconds for seconds in token_s], case=context.case)
    for name, seconds in score_s.items():
        ratios = [score / token for score, token in zip(seconds, token_s, strict=True)]
        yield figure(f"scoring by {name}", "ms", [1e3 * score for score in seconds], case=context.case)
        yield figure(f"scoring by {name} over a token", "x", ratios, KEY_SCORES, case=context.case)


def _sampling_figures(context: _Context, plan: Plan, say: Say) -> Iterator[Figure]:
    def turn(*, sampled: bool) -> float:
        context.evidence._sampler.pause(not sampled)
        return context.decode(plan.tokens)

    turn(sampled=True)
    ratios, speeds = [], []
    for number in range(plan.pairs):
        say(f"{context.case}: sampling, pair {number + 1} of {plan.pairs}")
        order: list[Callable[[], float]] = [lambda: turn(sampled=False), lambda: turn(sampled=True)]
        first, second = (one() for one in (order if number % 2 == 0 else order[::-1]))
        without, with_it = (first, second) if number % 2 == 0 else (second, first)
        ratios.append(without / with_it)
        speeds.append(plan.tokens / with_it)
    yield figure("sampled over unsampled speed", "x", ratios, SAMPLING, case=context.case)
    yield figure("sampled", "tokens/s", speeds, case=context.case)
