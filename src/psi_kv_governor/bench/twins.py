"""A governed context and a plain one with the same tokens in them, to hold against each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from psi_kv_governor.bench.record import Say
from psi_kv_governor.bench.sampling import sample
from psi_kv_governor.bench.worker import prompt_text
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.policy.base import Range
from psi_kv_governor.store.base import Store

CacheType = Literal["f16", "q8_0"]

_GGML_TYPES: dict[CacheType, int] = {"f16": 1, "q8_0": 8}  # enum ggml_type, <ggml.h>
_SPARE_CELLS = 256  # llama.cpp pads a context to it; the probe needs one
_CHARACTERS_PER_TOKEN = 8  # more than English has with any vocabulary, so that the text is long enough
_PREFILL_BATCH = 512


class Twins:
    """The same model twice in one process, with `tokens` tokens decoded by the plain one.

    A context manager. The governed one acts by hand only. One token at a time is decoded by one thread: a
    busy neighbour delays that least (ggml's threads spin for each other), and what is compared is bits.
    """

    def __init__(
        self, model: Path, cache: CacheType, tokens: int, *, threads: int, store: Store | None, say: Say
    ) -> None:
        from psi_kv_governor import GovernedLlama  # before llama_cpp: see native.load_before_llama_cpp

        settings: dict[str, Any] = {
            "n_ctx": tokens + _SPARE_CELLS,
            "n_threads": 1,
            "n_threads_batch": threads,
            "flash_attn": True,
            "type_k": ggml_type(cache),
            "type_v": ggml_type(cache),
            "verbose": False,
        }
        self.tokens = tokens
        self.governed: Any = GovernedLlama(str(model), auto=False, store=store, **settings)
        import llama_cpp

        self.plain: Any = llama_cpp.Llama(str(model), **settings)
        try:
            self.engine = engine_of(self.governed)
            *prompt, self._probe = prompt_tokens(self.plain, tokens + 1)
            prefill(self.plain, prompt, say, f"{cache}, {tokens:,} tokens")
            self._state = self.plain.save_state()
            self.governed.load_state(self._state)
            self.whole = self.next_logits(self.plain)
            """Logits after all tokens and the probe, in a context that never gave anything up."""
        except BaseException:
            self.close()
            raise

    def refill(self, *contexts: Any) -> None:
        """Every token is back in `contexts` as it was decoded, and nothing else."""
        for context in contexts:
            context.load_state(self._state)

    def remove(self, ranges: Sequence[Range]) -> None:
        """Take the cells of `ranges` out of both contexts: metadata only, the rows stay as they are."""
        for context in (self.governed, self.plain):
            for start, stop in ranges:
                context._ctx.kv_cache_seq_rm(0, start, stop)

    def next_logits(self, context: Any) -> npt.NDArray[np.float32]:
        """Logits after the probe token, shape (vocabulary,); the probe is taken out again."""
        import llama_cpp

        context.eval([self._probe])
        found = llama_cpp.llama_get_logits_ith(context.ctx, -1)
        logits: npt.NDArray[np.float32] = np.ctypeslib.as_array(found, shape=(context.n_vocab(),)).copy()
        context.n_tokens = self.tokens
        context._ctx.kv_cache_seq_rm(0, self.tokens, -1)
        return logits

    def close(self) -> None:
        self.plain.close()
        self.governed.close()

    def __enter__(self) -> Twins:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def engine_of(governed: Any) -> Any:
    """The engine, by whose protocol the steps are timed one by one. Raises PsiKvError where it can't trim."""
    able = governed.governor.capabilities
    for capability in (able.release, able.spill, able.recompute):
        if not capability.able:
            raise PsiKvError(f"nothing to measure with this model: {capability.why}")
    return governed._engine


def ggml_type(cache: CacheType) -> int:
    """The number by which `Llama` is told the type of its cache."""
    return _GGML_TYPES[cache]


def prompt_tokens(context: Any, count: int) -> list[int]:
    """The first `count` tokens of a text that every Python has. Raises PsiKvError when it has fewer."""
    tokens: list[int] = context.tokenize(prompt_text(count * _CHARACTERS_PER_TOKEN).encode())[:count]
    if len(tokens) < count:
        raise PsiKvError(f"the text has {len(tokens)} tokens with this model, and {count} are needed")
    return tokens


def prefill(context: Any, tokens: Sequence[int], say: Say, what: str) -> None:
    """Decode `tokens`, and say how far it is."""
    for start in range(0, len(tokens), _PREFILL_BATCH):
        say(f"{what}: decoding the prompt, {start:,} done")
        context.eval(tokens[start : start + _PREFILL_BATCH])


def differing(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> int:
    """How many of the values are not the same bits (two NaNs can be equal, 0 and -0 are not)."""
    return int(np.count_nonzero(left.view(np.uint32) != right.view(np.uint32)))


def anonymous_bytes() -> int:
    """Anonymous memory of this process: a walk over its page tables (`smaps_rollup`)."""
    look = sample(os.getpid())
    if look is None:
        raise PsiKvError("this kernel does not tell: /proc/self/smaps_rollup is needed (Linux 4.14)")
    return look.anonymous_bytes
