"""The context of a governed model: every change of the cache goes through the engine's safe points."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import llama_cpp
from llama_cpp import _internals

from psi_kv_governor.engine.llama.batch import Batch

if TYPE_CHECKING:
    from psi_kv_governor.engine.llama.engine import LlamaEngine


class GovernedContext(_internals.LlamaContext):  # type: ignore[misc]  # llama_cpp is untyped
    """A `LlamaContext` whose decodes and cache edits keep the engine's cell map in step.

    Made from a plain context with `govern`, not constructed: `Llama.__init__` makes the context itself.
    """

    engine: LlamaEngine

    @classmethod
    def govern(cls, context: _internals.LlamaContext, engine: LlamaEngine) -> None:
        """Turn `context` into a governed one in place.

        In place, because `Llama` has already put this very object on its exit stack: a second object
        around the same native context would free it twice.
        """
        context.__class__ = cls
        context.engine = engine

    def decode(self, batch: _internals.LlamaBatch) -> None:
        raw = batch.batch
        if raw.n_tokens == 0 or raw.seq_id[0][0] != 0:
            raise ValueError("a governed context decodes sequence 0 only")
        whole = Batch(self, raw)
        if whole.start + whole.n_tokens > self.n_ctx():
            # What llama.cpp says when no cell is free. After an eviction some are, past the context's end.
            raise RuntimeError(
                f"llama_decode returned 1: position {whole.start} + {whole.n_tokens} tokens > {self.n_ctx()}"
            )
        self.engine.decode(whole)

    def kv_cache_clear(self) -> None:
        self.engine.clear()

    def kv_cache_seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        track = self.engine.track
        if track.in_step and p1 < 0 and p0 >= len(track.ledger):
            return True  # before every token, `Llama` removes what is not there
        start, removed = max(p0, 0), False
        with self.engine.guard.hold():
            try:
                removed = bool(super().kv_cache_seq_rm(seq_id, p0, p1))
            finally:
                # Also when Ctrl-C came right after the end was cut off: llama.cpp no longer has it.
                if seq_id <= 0 and (removed or (p1 < 0 and track.sequences.length() <= start)):
                    self.engine.removed(start, p1)
        return removed

    def kv_cache_seq_cp(self, seq_id_src: int, seq_id_dst: int, p0: int, p1: int) -> None:
        raise NotImplementedError(
            "a governed context holds one sequence: sequences 1 and 2 are the governor's"
        )

    def kv_cache_seq_keep(self, seq_id: int) -> None:
        if seq_id != 0:
            raise NotImplementedError("a governed context holds one sequence, sequence 0")

    def kv_cache_seq_shift(self, seq_id: int, p0: int, p1: int, shift: int) -> None:
        # A shift rewrites K in every cell, which would fault every returned page back in (and it would
        # make what is in the store stale). Holes need no shift.
        raise NotImplementedError("a governed cache is never shifted: trim or truncate it instead")


class Sequences:
    """The cache's metadata operations by name, for one context."""

    MAIN, PARKED, SCRATCH = 0, 1, 2
    COUNT = 3

    def __init__(self, context: _internals.LlamaContext) -> None:
        self._context = context
        self._memory = context.memory

    def length(self) -> int:
        """Position after the last one of the main sequence."""
        return int(llama_cpp.llama_memory_seq_pos_max(self._memory, self.MAIN)) + 1

    def move(self, source: int, target: int, start: int, stop: int) -> None:
        """Cells of [start, stop) of sequence `source` belong to `target` from now on; no data moves."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, start, stop)
        llama_cpp.llama_memory_seq_rm(self._memory, source, start, stop)

    def remove(self, sequence: int, start: int, stop: int) -> None:
        """Free the cells of [start, stop) of `sequence`; a stop of -1 means to the end."""
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, start, stop)

    def forget_all(self) -> None:
        """Free every cell, without touching the rows."""
        llama_cpp.llama_memory_clear(self._memory, False)

    def saved(self, sequence: int, buffer: ctypes.Array[ctypes.c_uint8]) -> bytes:
        """What llama.cpp itself saves as the state of `sequence`: positions, then every row.

        Takes `buffer` where it is large enough; rows that are out of reach are saved too.
        """
        needed = llama_cpp.llama_state_seq_get_size(self._context.ctx, sequence)
        if needed > len(buffer):
            buffer = (ctypes.c_uint8 * needed)()
        n_bytes = llama_cpp.llama_state_seq_get_data(self._context.ctx, buffer, len(buffer), sequence)
        return ctypes.string_at(buffer, n_bytes)

    def saved_position(self, position: int, buffer: ctypes.Array[ctypes.c_uint8]) -> bytes:
        """What llama.cpp itself saves of one live position."""
        llama_cpp.llama_memory_seq_cp(self._memory, self.MAIN, self.SCRATCH, position, position + 1)
        try:
            return self.saved(self.SCRATCH, buffer)
        finally:
            self.remove(self.SCRATCH, -1, -1)
