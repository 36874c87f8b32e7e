"""The one place of the benchmarks that takes a governed context apart: single ranges, evidence, logits.

Everything else asks the process that holds a model (`psi_kv_governor.sandbox.worker`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from psi_kv_governor.config import GovernorConfig, load_config
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.governor import Governor
from psi_kv_governor.policy import Policy, Range
from psi_kv_governor.policy.base import Evidence, Kind, Values
from psi_kv_governor.policy.chooser import Chooser, check_served
from psi_kv_governor.pressure.reading import PressureSource
from psi_kv_governor.sandbox import llm as llms
from psi_kv_governor.sandbox.messages import Setup
from psi_kv_governor.store import open_store

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
        self.config: GovernorConfig = load_config(**llms.settings_of(setup))
        self.llm: Any = llms.open_llm(setup, n_ctx, setup.prefill_threads or setup.threads)
        self._store = open_store(load_config(store="disk"))
        if why := llms.why_not_governable(self.llm):
            self.close()
            raise PsiKvError(f"nothing to measure with this model: {why}")

    def __enter__(self: _C) -> _C:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model."""
        self.llm.close()
        if self._store is not None:
            self._store.close()

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
        llms.cut(self.llm, length)

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
    def cell_bytes(self) -> int:
        """K and V of one token in every layer."""
        return int(self.llm._engine.cell_bytes)

    def remove(self, ranges: Sequence[Range]) -> None:
        """Take the cells of `ranges` out of the metadata, as upstream does: the rows stay as they are."""
        for start, stop in ranges:
            self.llm._ctx.kv_cache_seq_rm(0, start, stop)

    def release(self) -> int:
        """Return the pages of cells nobody uses; gives the bytes."""
        return int(self.llm._engine.release())

    def mask(self, ranges: Sequence[Range]) -> float:
        """Give `ranges` up, to come back bit for bit; gives the seconds. Raises PsiKvError for less."""
        done = self.llm._engine.trim(ranges, self._store)
        cells = sum(part.cells for part in ranges)
        if done.problem or done.spilled != cells:
            raise PsiKvError(f"{done.spilled} of {cells} cells were given up. {done.problem}".strip())
        return float(done.seconds)

    def unmask(self) -> float:
        """Put everything back; gives the seconds. Raises PsiKvError where something stays away."""
        done = self.llm._engine.restore(self.n_tokens, self._store)
        if done.problem or done.missing:
            raise PsiKvError(f"{done.missing} cells did not come back. {done.problem}".strip())
        return float(done.seconds)

    def evict(self, ranges: Sequence[Range]) -> None:
        """Drop the content of `ranges`."""
        self.llm._engine.trim(ranges, None)

    def decode_again(self) -> None:
        """Have what was dropped decoded again. Raises PsiKvError where something stays away."""
        if missing := llms.put_back(self.llm):
            raise PsiKvError(f"{missing} cells were not decoded again")

    def missing_share(self) -> float:
        """Of the context, that attention does not look at."""
        ledger = self.llm._engine.ledger
        return float(ledger.holes() / len(ledger)) if len(ledger) else 0.0

    # -- policies ---------------------------------------------------------------------------------------

    def collect(self, kinds: frozenset[Kind]) -> None:
        """Gather evidence from now on."""
        self.llm._engine.evidence.collect(kinds)
        self.evidence: Evidence = _Gathered(self.llm._engine.evidence)

    def sample(self, on: bool) -> None:
        """Whether attention is sampled while tokens are decoded."""
        self.llm._engine.evidence._sampler.pause(not on)

    def sampled(self) -> Any:
        """What has been sampled so far, to go back to."""
        return self.llm._engine.evidence.snapshot()

    def forget_sampled(self, sampled: Any) -> None:
        """Forget what was sampled since."""
        self.llm._engine.evidence.rewind(sampled)

    def check_served(self, policy: Policy) -> None:
        """Raises BadInputError where this cache can't serve it."""
        check_served(policy, self.llm._engine.evidence, asked_for=True)

    def chosen(self, policy: Policy, cells: int) -> list[Range]:
        """The ranges of `cells` cells that `policy` would give up now. Raises PsiKvError where it fails."""
        engine = self.llm._engine

        def refuse(why: str) -> None:  # in a governor it is replaced; what is measured then is another one
            raise PsiKvError(why)

        chooser = Chooser(
            policy, self.evidence, engine.ledger, self.config, row_bytes=engine.row_bytes, complain=refuse
        )
        return chooser.choose(cells)

    @contextmanager
    def governed(self, policy: Policy, source: PressureSource) -> Iterator[Governor]:
        """A governor of its own over this context, moved step by step; all is back when it is left."""
        engine: Any = _Shared(self.llm._engine, self.evidence)
        governor = Governor(engine, source=source, policy=policy, store=self._store, config=self.config)
        try:
            yield governor
        finally:
            governor.close()


class _Gathered:
    """Evidence that is gathered from the start for all policies.

    One context serves them all in turn, each with the cache as it was decoded. So it begins nothing anew for
    one of them, and what was restored after another's turn counts as decoded in its place.
    """

    def __init__(self, inner: Evidence) -> None:
        self.why_not, self.attention, self.last_used = inner.why_not, inner.attention, inner.last_used
        self.key_norms, self.key_diffs = inner.key_norms, inner.key_diffs

    def collect(self, kinds: frozenset[Kind]) -> None:
        """Nothing: it is gathered already, and beginning anew would forget it."""

    def arrivals(self, part: Range) -> Values:
        """The order of decoding."""
        return np.arange(part.start, part.stop, dtype=np.float64)


class _Shared:
    """The engine that many governors use in turn, with evidence that none of them begins anew."""

    def __init__(self, inner: Any, evidence: Evidence) -> None:
        self._inner, self.evidence = inner, evidence

    def trim(self, ranges: Sequence[Range], store: Any, deadline_s: float = 0.0) -> Any:
        """Without the deadline: what goes is measured, and not whether this machine is slow."""
        del deadline_s
        return self._inner.trim(ranges, store)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def differing(left: Logits, right: Logits) -> int:
    """How many of the values are not the same bits (two NaNs can be equal, 0 and -0 are not)."""
    return int(np.count_nonzero(left.view(np.uint32) != right.view(np.uint32)))
