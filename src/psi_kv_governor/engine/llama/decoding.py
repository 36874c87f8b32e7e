"""Decoding on a governed context: interrupted for somebody urgent and run again, and again in place."""

from __future__ import annotations

from typing import Protocol

from llama_cpp import _internals

from psi_kv_governor.engine.base import Capabilities
from psi_kv_governor.engine.llama.batch import Batch, decoded
from psi_kv_governor.engine.llama.context import Sequences
from psi_kv_governor.engine.llama.safepoint import SafePoint
from psi_kv_governor.engine.llama.tap import Tap
from psi_kv_governor.engine.llama.track import Track
from psi_kv_governor.errors import EngineError
from psi_kv_governor.ledger import LIVE
from psi_kv_governor.policy.base import Range

_LEAST_PIECE = 32
"""Tokens of the smallest piece into which an interrupted batch is cut: a quarter of a second of prefill on
the demo model, and the width below which the matrix products get slower by the token."""


class Cache(Protocol):
    """What decoding asks of the engine around it."""

    @property
    def capabilities(self) -> Capabilities: ...

    def mend_end(self, length: int) -> None:
        """Put back what is missing right before position `length`."""

    def removed(self, start: int, stop: int) -> None:
        """Positions went out of the sequence."""


class Decoding:
    """Runs the decodes of one context, each piece of them outside of all safe points."""

    def __init__(
        self, context: _internals.LlamaContext, tap: Tap, track: Track, guard: SafePoint, cache: Cache
    ) -> None:
        self._context = context
        self._tap = tap
        self._track = track
        self._guard = guard
        self._cache = cache

    def decode(self, batch: Batch) -> None:
        """Decode `batch` whole, or in pieces where it was interrupted."""
        done, size = 0, batch.n_tokens
        while done < batch.n_tokens:
            count = min(size, batch.n_tokens - done)
            if self._decode_piece(batch, done, count):
                done += count
                batch.insistent = False
            elif batch.divisible():
                # In smaller pieces from here, and one of the smallest is not interrupted twice: however often
                # somebody urgent comes, it gets done.
                done = max(0, self._track.sequences.length() - batch.start)
                batch.insistent = size <= _LEAST_PIECE
                size = max(_LEAST_PIECE, count // 2)
            else:
                self._undo(batch.start)  # its outputs are wanted together
                batch.insistent = True

    def _decode_piece(self, batch: Batch, done: int, count: int) -> bool:
        """Decode `count` tokens after the first `done`; False where it was interrupted."""
        track, start = self._track, batch.start + done
        tokens = batch.tokens if count == batch.n_tokens else batch.part(done, count)
        interruptible = not (batch.insistent or self._guard.mine)  # who has it already would never let go
        with self._guard.hold():
            if not track.in_step or start != len(track.ledger):
                track.catch_up()
                self._cache.mend_end(start)
            track.expect(start, tokens)
            self._tap.counters.interruptible = interruptible
            try:
                if not batch.run(done, count, self._tap):
                    track.catch_up()
                    return False
            except BaseException:
                track.catch_up()
                raise
            finally:
                self._tap.counters.interruptible = False
            if tokens is None:
                track.catch_up()
            else:
                track.decoded(start, count)
        return True

    def _undo(self, length: int) -> None:
        with self._guard.hold():
            self._track.sequences.remove(Sequences.MAIN, length, -1)
            self._cache.removed(length, -1)

    def again(self, lost: Range, *, interruptible: bool = False) -> None:
        """Decode the first of the `lost` positions again, as many as a batch takes; some of them, where it is
        interrupted. At a safe point. Raises EngineError when their tokens are not known.

        The tokens after the hole are set aside meanwhile (metadata only), since llama.cpp decodes only at
        the end of a sequence; they keep the rows they have.
        """
        sequences = self._track.sequences
        part = Range(lost.start, min(lost.stop, lost.start + self._context.params.n_batch))
        tokens = self._tokens(part)
        if tokens is None:
            raise EngineError("lost tokens can't be recomputed here: they are not known as tokens")
        ledger = self._track.ledger
        after = list(ledger.ranges(LIVE, Range(part.stop, len(ledger))))
        for run in after:
            sequences.move(Sequences.MAIN, Sequences.SCRATCH, run.start, run.stop)
        try:
            self._tap.counters.interruptible = interruptible
            self._run(tokens, part.start)
        finally:
            self._tap.counters.interruptible = False
            # Also when the rest failed, or Ctrl-C came: llama.cpp has what was decoded, and so must the map.
            self._track.recomputed(part.start)
            for run in after:
                sequences.move(Sequences.SCRATCH, Sequences.MAIN, run.start, run.stop)

    def can_again(self, part: Range) -> bool:
        """Whether `part` can be decoded again once it is lost."""
        return self._tokens(part) is not None

    def _tokens(self, part: Range) -> list[int] | None:
        return self._track.tokens(part) if self._cache.capabilities.recompute.able else None

    def _run(self, tokens: list[int], start: int) -> None:
        batch = _internals.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1, verbose=False)
        try:
            batch.set_batch(tokens, n_past=start, logits_all=False)
            decoded(self._context, batch.batch, self._tap)
        finally:
            batch.close()
