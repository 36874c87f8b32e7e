"""A context longer than anybody would wait for: a part is decoded once, and copied to the places behind it.

What stands in the cells does not matter to what a token costs; how many there are does.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from psi_kv_governor.cache import CacheState, Plan, Range, SequenceState, Step, Verb, cells_in
from psi_kv_governor.engines.llama import process
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.sandbox.text import prompt_text
from psikv_bench.raw_context import PART, RawContext


class LongContext(RawContext):
    """One conversation of many copies of a part. A context manager.

    Raises PsiKvError where the model can't be run, or its cache not be parked.
    """

    def __init__(self, model: Path, n_ctx: int, threads: int) -> None:
        super().__init__(model, n_ctx, threads, 2, unified=True)  # the second one is what is copied from
        self.engine = process.engine(self.chosen, lambda: ctypes.cast(self.ctx, ctypes.c_void_p).value or 0)
        self.n_tokens = 0
        self._text = self._tokens(PART)

    def _tokens(self, count: int) -> list[int]:
        vocab = self.api.llama_model_get_vocab(self._model)
        text = prompt_text(8 * count).encode()
        found = (self.api.llama_token * (4 * len(text)))()  # a space is three bytes to some
        n = self.api.llama_tokenize(vocab, text, len(text), found, len(found), True, False)
        return list(found[: min(n, count)])

    def fill(self, count: int) -> None:
        """Have `count` tokens, a multiple of PART, in the context. Raises PsiKvError where that fails."""
        self.read(self._text, sequence=1)
        size = self.api.llama_state_seq_get_size(self.ctx, 1)
        state = (ctypes.c_uint8 * size)()
        self.api.llama_state_seq_get_data(self.ctx, state, size, 1)
        for first in range(0, count, PART):
            if not self.api.llama_state_seq_set_data(self.ctx, state, size, 1):
                raise PsiKvError("a state can't be loaded")
            self.api.llama_memory_seq_add(self.memory, 1, 0, -1, first)
            self.api.llama_memory_seq_cp(self.memory, 1, 0, -1, -1)
            self.api.llama_memory_seq_rm(self.memory, 1, -1, -1)
        self.n_tokens = count

    def decode_singly(self, count: int) -> None:
        """Decode `count` tokens one by one."""
        for number in range(count):
            self.decode([self._text[number % PART]], self.n_tokens)
            self.n_tokens += 1

    def cache(self) -> CacheState:
        """The cache."""
        (cache,) = self.engine.snapshot().caches
        return cache

    def sequence(self) -> SequenceState:
        """The conversation."""
        return next(one for one in self.cache().sequences if one.id == 0)

    def mask(self, part: Range) -> None:
        """Give `part` up. Raises PsiKvError for less."""
        step = Step(verb=Verb.MASK, cache=self.cache().id, sequence=0, ranges=(part,))
        done = self.engine.apply(Plan(steps=(step,)))
        if done.problem or done.masked != cells_in([part]):
            raise PsiKvError(done.problem or f"{done.masked} of {part.cells} cells were given up")
