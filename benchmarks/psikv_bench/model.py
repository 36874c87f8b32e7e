"""The one place of the benchmarks that takes a governed context apart: single ranges, evidence, logits.

Everything else asks the process that holds a model (`psikv_bench.worker`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from psi_kv_governor.cache import (
    CacheState,
    Description,
    Evidence,
    Kind,
    Plan,
    Range,
    Recall,
    Result,
    SequenceState,
    Snapshot,
    Step,
    Values,
    Verb,
    cells_in,
)
from psi_kv_governor.config import GovernorConfig, load_config
from psi_kv_governor.engines.llama.engine import LlamaEngine
from psi_kv_governor.engines.llama.evidence import LlamaEvidence
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.governor import Governor
from psi_kv_governor.policy import Policy
from psi_kv_governor.policy.scoring import Scores, check_served
from psi_kv_governor.policy.select import Protection
from psi_kv_governor.pressure.reading import PressureSource
from psikv_bench import llm as states
from psikv_bench.messages import Setup

_C = TypeVar("_C", bound="Context")

Logits = npt.NDArray[np.float32]
"""Shape (tokens, vocabulary)."""

BATCH_TOKENS = 512
"""Tokens that are decoded at once: llama.cpp's default."""


class Context:
    """A governed context that acts on order only. A context manager.

    Raises PsiKvError where nothing of this model can be given up.
    """

    def __init__(self, setup: Setup, n_ctx: int) -> None:
        self.config: GovernorConfig = load_config(**setup.governor_settings())
        threads = setup.prefill_threads or setup.threads
        self.llm: Any = states.opened(
            msgspec.structs.replace(setup, context_cells=n_ctx, prefill_threads=threads)
        )
        if why := states.why_not_governable(self.llm):
            self.close()
            raise PsiKvError(f"nothing to measure with this model: {why}")
        self.llm.eval([0])  # the engine knows a cache from the first decode on
        states.cut(self.llm, 0)
        self.engine.recall(Recall())  # what is given up stays away, unless a measurement asks for recall

    def __enter__(self: _C) -> _C:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model."""
        self.llm.close()

    # -- tokens -----------------------------------------------------------------------------------------

    @property
    def n_tokens(self) -> int:
        """Length of the context."""
        return int(self.llm.n_tokens)

    def read(self, tokens: Sequence[int]) -> None:
        """Decode `tokens` after the context."""
        for start in range(0, len(tokens), BATCH_TOKENS):
            self.llm.eval(list(tokens[start : start + BATCH_TOKENS]))

    def cut(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        states.cut(self.llm, length)

    def logits(self, tokens: Sequence[int]) -> Logits:
        """Decode `tokens` (at most a batch) after the context; gives the logits after each."""
        from llama_cpp import _internals

        batch = _internals.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1, verbose=False)
        try:
            batch.set_batch(list(tokens), n_past=self.n_tokens, logits_all=True)
            self.llm._ctx.decode(batch)
        finally:
            batch.close()
        self.llm.n_tokens += len(tokens)
        shape = (len(tokens), self.llm.n_vocab())
        found: Logits = np.ctypeslib.as_array(self.llm._ctx.get_logits(), shape=shape).copy()
        return found

    # -- cells ------------------------------------------------------------------------------------------

    @property
    def engine(self) -> LlamaEngine:
        """The engine over the context's cache."""
        engine = self.llm.governor.engine
        assert isinstance(engine, LlamaEngine)
        return engine

    def cache(self) -> CacheState:
        """The context's cache. Raises PsiKvError before the first token was decoded."""
        caches = [cache for cache in self.engine.snapshot().caches if cache.maskable]
        if len(caches) != 1:
            raise PsiKvError("nothing to measure: nothing was decoded yet, or there are several caches")
        return caches[0]

    def sequence(self) -> SequenceState:
        """The context as a sequence of its cache."""
        (sequence,) = self.cache().sequences
        return sequence

    def apply(self, verb: Verb, ranges: Sequence[Range] = (), *, sequence: int | None = 0) -> Result:
        """Have the engine do one thing with the context. Raises PsiKvError where there is a problem."""
        step = Step(verb=verb, cache=self.cache().id, sequence=sequence, ranges=tuple(ranges))
        result = self.engine.apply(Plan(steps=(step,)))
        if result.problem:
            raise PsiKvError(result.problem)
        return result

    @property
    def cell_bytes(self) -> int:
        """K and V of one token in every layer."""
        return self.cache().cell_bytes

    def mask(self, ranges: Sequence[Range]) -> float:
        """Give `ranges` up, to come back bit for bit; gives the seconds. Raises PsiKvError for less."""
        if not ranges:  # to the engine that is all of it
            return 0.0
        done = self.apply(Verb.MASK, ranges)
        if done.masked != cells_in(ranges):
            raise PsiKvError(f"{done.masked} of {cells_in(ranges)} cells were given up")
        return done.seconds

    def unmask(self) -> float:
        """Put everything back; gives the seconds. Raises PsiKvError where something stays away."""
        done = self.apply(Verb.UNMASK)
        if away := self.sequence().masked_cells:
            raise PsiKvError(f"{away} cells did not come back")
        return done.seconds

    def missing_share(self) -> float:
        """Of the context, that attention does not look at."""
        sequence = self.sequence()
        return sequence.masked_cells / sequence.next_position if sequence.next_position else 0.0

    # -- policies ---------------------------------------------------------------------------------------

    @property
    def evidence(self) -> Evidence:
        """What a policy can ask about the context."""
        return _Gathered(self._native())

    def _native(self) -> LlamaEvidence:
        return self.engine.evidence(self.cache().id, 0)

    def sampled(self) -> bytes:
        """What has been sampled so far, to go back to."""
        return self._native().sampled()

    def forget_sampled(self, sampled: bytes) -> None:
        """Forget what was sampled since."""
        self._native().rewind(sampled)

    def check_served(self, policy: Policy) -> None:
        """Raises BadInputError where this cache can't serve it."""
        check_served(policy, self._native())

    def chosen(self, policy: Policy, cells: int) -> list[Range]:
        """The ranges of `cells` cells that `policy` would give up now. Raises PsiKvError where it fails."""

        def refuse(why: str) -> None:  # in a governor it is replaced; what is measured then is another one
            raise PsiKvError(why)

        scores = Scores(policy, lambda cache, sequence: self.evidence, self.config.block_cells, refuse)
        protection = Protection(sink_cells=self.config.sink_cells, window_cells=self.config.window_cells)
        return scores.lowest(self.cache(), self.sequence(), protection, cells)

    @contextmanager
    def governed(self, policy: Policy, source: PressureSource) -> Iterator[Governor]:
        """A governor of its own over this context, moved step by step; all is back when it is left."""
        governor = Governor(_Shared(self), source=source, policy=policy, config=self.config)
        try:
            yield governor
        finally:
            governor.close()


class _Gathered:
    """Evidence that is gathered from the start for all policies: what was restored after another's turn
    counts as decoded in its place."""

    def __init__(self, inner: Evidence) -> None:
        self.why_not, self.attention, self.last_used = inner.why_not, inner.attention, inner.last_used
        self.key_norms, self.key_diffs = inner.key_norms, inner.key_diffs
        self.demand = inner.demand

    def arrivals(self, part: Range) -> Values:
        """The order of decoding."""
        return np.arange(part.start, part.stop, dtype=np.float64)


class _Shared:
    """The engine that many governors use in turn: none of them begins the evidence anew, and the context
    counts as running, however slow this machine is."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def describe(self) -> Description:
        """See Engine."""
        return self._context.engine.describe()

    def snapshot(self) -> Snapshot:
        """See Engine."""
        snapshot = self._context.engine.snapshot()
        caches = tuple(
            msgspec.structs.replace(
                cache,
                sequences=tuple(msgspec.structs.replace(one, running=True) for one in cache.sequences),
            )
            for cache in snapshot.caches
        )
        return msgspec.structs.replace(snapshot, caches=caches)

    def apply(self, plan: Plan) -> Result:
        """See Engine. Without a deadline for what goes: that is measured, and not this machine."""
        gives = all(step.verb is Verb.MASK for step in plan.steps)
        return self._context.engine.apply(
            msgspec.structs.replace(plan, deadline_s=math.inf) if gives else plan
        )

    def collect(self, kinds: frozenset[Kind]) -> None:
        """See Engine. It is gathered already, and beginning anew would forget it."""

    def evidence(self, cache: int, sequence: int) -> Evidence:
        """See Engine."""
        del cache, sequence
        return self._context.evidence

    def close(self) -> None:
        """See Engine."""


def differing(left: Logits, right: Logits) -> int:
    """How many of the values are not the same bits (two NaNs can be equal, 0 and -0 are not)."""
    return int(np.count_nonzero(left.view(np.uint32) != right.view(np.uint32)))
