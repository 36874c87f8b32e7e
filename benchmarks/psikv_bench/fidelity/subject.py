"""The model under test: one context, read once, from which every policy gives up in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn, cast

import numpy as np
from psikv_bench.fidelity.contenders import Contender, needs
from psikv_bench.fidelity.evidence import GatheredEvidence, SharedEngine
from psikv_bench.fidelity.memory_store import MemoryStore
from psikv_bench.fidelity.metrics import Logits

from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engine.base import Engine
from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.policy import Policy, Range
from psi_kv_governor.policy.chooser import Chooser, check_served
from psi_kv_governor.store.base import Store

CacheType = Literal["f16", "q8_0", "q4_0"]
_GGML_TYPES: dict[CacheType, int] = {"f16": 1, "q8_0": 8, "q4_0": 2}  # enum ggml_type, <ggml.h>
_BATCH = 512
"""Tokens that are decoded at once: llama.cpp's default."""


@dataclass(frozen=True)
class Mark:
    """A place in the context to come back to."""

    n_tokens: int
    sampled: Any
    """What had been sampled of the attention by then."""


class Subject:
    """A governed model whose context is read once and then trimmed, asked and restored again and again.

    A context manager. What a policy does not decide is the same for all: the cells given up (whole blocks),
    the tokens before and after, and the attention that was sampled on the way.

    Raises BadInputError where the cache can't serve one of the policies, or the context is too long for the
    model; PsiKvError where the model can't give up a range at all.
    """

    def __init__(
        self,
        model: Path,
        compared: Sequence[Contender],
        *,
        n_ctx: int,
        threads: int,
        cache: CacheType = "f16",
        config: GovernorConfig | None = None,
    ) -> None:
        from psi_kv_governor import GovernedLlama  # before llama_cpp: see native.load_before_llama_cpp

        _check_length(model, n_ctx)
        self.config = config or GovernorConfig()
        self.compared = compared
        self.n_ctx = n_ctx
        self.store: Store = MemoryStore()
        self._ids: list[int] = []
        self._llm: Any = GovernedLlama(
            str(model),
            auto=False,
            config=self.config,
            store=self.store,
            n_ctx=n_ctx,
            n_batch=_BATCH,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=True,
            type_k=_GGML_TYPES[cache],
            type_v=_GGML_TYPES[cache],
            verbose=False,
        )
        try:
            self._check()
        except BaseException:
            self.close()
            raise
        engine: Any = self._llm._engine
        self._evidence = GatheredEvidence(engine.evidence, needs(compared))
        self.engine: Engine = cast(Engine, SharedEngine(engine, self._evidence))

    def _check(self) -> None:
        able = self._llm.governor.capabilities.spill
        if not able.able:
            raise PsiKvError(f"nothing to measure with this model: {able.why}")
        for one in self.compared:
            check_served(one.policies[0], self._llm._engine.evidence, asked_for=True)

    # -- reading ----------------------------------------------------------------------------------------

    def tokens(self, text: str) -> list[int]:
        """The tokens of `text`, with nothing put before them; a chat template's own are known."""
        found: list[int] = self._llm.tokenize(text.encode(), add_bos=False, special=True)
        return found

    @property
    def opening(self) -> list[int]:
        """What this model wants at the start of a text: its BOS token, or nothing."""
        found: list[int] = self._llm.tokenize(b"", add_bos=True)
        return found

    @property
    def template(self) -> str | None:
        """The model's chat template, in Jinja; None where it brings none."""
        found: str | None = self._llm.metadata.get("tokenizer.chat_template")
        return found

    def text(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`."""
        return str(self._llm.detokenize(list(tokens), special=True).decode(errors="replace"))

    @property
    def n_tokens(self) -> int:
        """Length of the context."""
        return int(self._llm.n_tokens)

    def forget(self) -> None:
        """Empty the context."""
        self._truncate(0)

    def load(self, tokens: Sequence[int]) -> None:
        """Have `tokens` as the context, by reading on where they begin with what is in it already."""
        if self._ids != list(tokens[: self.n_tokens]):
            self.forget()
        self.read(tokens[self.n_tokens :])

    def read(self, tokens: Sequence[int]) -> None:
        """Decode `tokens` after the context."""
        for start in range(0, len(tokens), _BATCH):
            part = list(tokens[start : start + _BATCH])
            self._llm.eval(part)
            self._ids += part

    def logits(self, tokens: Sequence[int]) -> Logits:
        """Decode `tokens` (at most a batch) after the context; gives the logits after each."""
        from llama_cpp import _internals

        batch = _internals.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1, verbose=False)
        try:
            batch.set_batch(list(tokens), n_past=self.n_tokens, logits_all=True)
            self._llm._ctx.decode(batch)
        finally:
            batch.close()
        self._llm.n_tokens += len(tokens)
        self._ids += tokens
        shape = (len(tokens), self._llm.n_vocab())
        found: Logits = np.ctypeslib.as_array(self._llm._ctx.get_logits(), shape=shape).copy()
        return found

    def greedy(self, token: int, count: int) -> list[int]:
        """The `count` most probable tokens in turn, after `token` was decoded."""
        answer: list[int] = []
        for _ in range(count):
            token = int(self.logits([token])[-1].argmax())
            answer.append(token)
        return answer

    # -- going back -------------------------------------------------------------------------------------

    def mark(self) -> Mark:
        """The present end of the context."""
        return Mark(self.n_tokens, self._llm._engine.evidence.snapshot())

    def back_to(self, mark: Mark) -> None:
        """Forget all that came after `mark`. What was given up since stays away until it is restored."""
        self._truncate(mark.n_tokens)
        self._llm._engine.evidence.rewind(mark.sampled)

    def _truncate(self, length: int) -> None:
        self._llm.n_tokens = length
        del self._ids[length:]
        self._llm._ctx.kv_cache_seq_rm(0, length, -1)

    # -- giving up --------------------------------------------------------------------------------------

    def trim(self, policy: Policy, cells: int, store: Store | None = None) -> None:
        """Give up the `cells` cells that `policy` chooses. Raises PsiKvError where it gave up others."""
        chooser = Chooser(
            policy,
            self._evidence,
            self.engine.ledger,
            self.config,
            row_bytes=self.engine.row_bytes,
            complain=_refuse,
        )
        done = self.engine.trim(chooser.choose(cells), store or self.store)
        if done.problem or done.spilled != cells:
            raise PsiKvError(f"{policy.name} gave up {done.spilled} of {cells} cells. {done.problem}".strip())

    def trim_cell(self, position: int) -> None:
        """Give up one cell."""
        self.engine.trim([Range(position, position + 1)], self.store)

    def restore(self) -> None:
        """Put everything back. Raises PsiKvError where something stays away."""
        done = self.engine.restore(len(self.engine.ledger), self.store)
        if done.problem or done.missing:
            raise PsiKvError(f"{done.missing} cells did not come back. {done.problem}".strip())

    @contextmanager
    def trimmed(self, policy: Policy, share: float) -> Iterator[None]:
        """Without `share` of the context, as `policy` chooses; whole again, and no longer, afterwards."""
        mark = self.mark()
        try:
            self.trim(policy, self.cells(share))
            yield
        finally:
            self.back_to(mark)
            self.restore()

    def cells(self, share: float) -> int:
        """`share` of the context in whole blocks, so that every policy gives up the same number of cells."""
        block = self.config.block_cells
        return round(share * self.n_tokens / block) * block

    # -- the end ----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free the model."""
        self._llm.close()

    def __enter__(self) -> Subject:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_length(model: Path, n_ctx: int) -> None:
    """Before a context is made of it: llama.cpp would only warn. Raises BadInputError."""
    from llama_cpp import _internals, llama_model_default_params
    from llama_cpp._logger import set_verbose

    set_verbose(False)
    params = llama_model_default_params()
    params.vocab_only = True
    head = _internals.LlamaModel(path_model=str(model), params=params, verbose=False)
    try:
        told = head.metadata()
    finally:
        head.close()
    trained = int(told.get(f"{told.get('general.architecture')}.context_length", n_ctx))
    if n_ctx > trained:
        raise BadInputError(f"a context of {n_ctx} tokens is beyond this model's {trained}: say less (--ctx)")


def _refuse(why: str) -> NoReturn:
    """A policy that fails is replaced in a governor; what would be measured here then is another one."""
    raise PsiKvError(why)
