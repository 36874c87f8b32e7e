"""The context of a `llama_cpp.Llama` that may be made anew behind the program's back."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import llama_cpp
from llama_cpp import _internals

from psi_kv_governor.engines.llama.resize.resizer import Resizer
from psi_kv_governor.errors import EngineError
from psi_kv_governor.worker import Worker

_IDLE_S = 1.0
"""Logits that nobody took for so long are given up: the last token is decoded again when they are wanted."""
_LOOK_S = 0.005
_OURS = "psi_kv_governor.engines.llama"
_INSIDE = frozenset(
    {"llama_cpp.llama", "llama_cpp._internals", __name__, "psi_kv_governor.llama", "psi_kv_governor.healing"}
    | {f"{_OURS}.{name}" for name in ("states", "resize.opening")}
)
"""Modules that ask for the context's address anew at each call."""


class ResizableContext(_internals.LlamaContext):  # type: ignore[misc]  # mypy here follows no import of llama_cpp
    """What upstream's wrapper is, made of one by `adopt`: same object, same methods.

    The llama_context behind it is replaced only while nobody is inside of a method, and only when the logits
    of the last decode were taken: at the start of a decode, between two tokens, or when nobody decodes.
    """

    resizer: Resizer
    lock: threading.RLock
    fresh: Callable[[], None]
    """Decodes the last token again where a new context has no logits of it."""
    patience_s: float
    """Logits that nobody took for so long may go."""
    stale: bool
    """There are no logits of the last token: the context is new."""
    why_pinned: str
    affected_from: int | None
    """First position that was decoded while others were masked."""
    decoded_s: float
    decoding: bool
    _taken: bool
    _orders: threading.Lock
    _order: _Order | None
    _worker: Worker

    @classmethod
    def adopt(cls, context: Any, resizer: Resizer) -> ResizableContext:
        """Make `context` resizable."""
        context.__dict__.pop("ctx")
        context.__class__ = cls
        context.resizer = resizer
        context.lock = threading.RLock()
        context.stale = False
        context.why_pinned = ""
        context.affected_from = None
        context.decoded_s = 0.0
        context.decoding = False
        context.fresh = lambda: None
        context.patience_s = _IDLE_S
        context._taken = True
        context._orders = threading.Lock()
        context._order = None
        context._worker = Worker("psi-kv-resize")
        assert isinstance(context, cls)
        return context

    @property
    def ctx(self) -> Any:
        """The llama_context. Whoever else takes its address may use it at any later moment: from then on it
        stays where it is."""
        if self.resizer.pointer is not None and sys._getframe(1).f_globals.get("__name__") not in _INSIDE:
            self.pin("the program took the context's address")
        return self.resizer.pointer

    @ctx.setter
    def ctx(self, pointer: Any) -> None:
        self.resizer.pointer = pointer
        if pointer is None:
            self.resizer.forget()

    def pin(self, why: str) -> None:
        """Make it whole, and leave it so."""
        with self.lock:
            if self.why_pinned:
                return
            self.resizer.most_outputs = 0  # whoever decodes by itself may ask for more than upstream's own
            try:
                self.make_whole()
            except EngineError as error:
                why = f"{why}, and not all came back: {error}"
            self.why_pinned = why

    def close(self) -> None:
        with self.lock:
            super().close()
        if (worker := self.__dict__.get("_worker")) is not None:
            worker.close()

    # -- orders -----------------------------------------------------------------------------------------

    def order(self, action: Callable[[], None], patience_s: float) -> bool:
        """Have `action` replace the context at a moment when that is right; gives whether it came within
        `patience_s`. Raises what it raises."""
        order = _Order(action)
        with self._orders:
            self._order = order
        until_s = time.monotonic() + patience_s
        while not order.done.wait(_LOOK_S):
            if self.lock.acquire(blocking=False):
                try:
                    if self._taken or time.monotonic() - self.decoded_s > self.patience_s:
                        self._carry_out()
                finally:
                    self.lock.release()
            if time.monotonic() >= until_s and self._withdrawn(order):
                return False
        if order.error is not None:
            raise order.error
        return True

    def _withdrawn(self, order: _Order) -> bool:
        with self._orders:
            mine = self._order is order
            self._order = None if mine else self._order
        return mine

    def _carry_out(self) -> None:
        with self._orders:
            order, self._order = self._order, None
        if order is None:
            return
        try:
            if self.why_pinned:
                raise EngineError(self.why_pinned)
            self.undisturbed(order.action)
        except EngineError as error:
            order.error = error
        finally:
            order.done.set()

    def undisturbed(self, action: Callable[[], None]) -> None:
        """Do it where no Ctrl-C can split it. The lock is held."""
        before = self.resizer.pointer
        try:
            self._worker.do(action)
        finally:
            if self.resizer.pointer is not before:
                self.memory = (
                    llama_cpp.llama_get_memory(self.resizer.pointer) if self.resizer.pointer else None
                )
                self.stale = True

    # -- what upstream calls ------------------------------------------------------------------------------

    def decode(self, batch: Any) -> None:
        with self.lock:
            self._carry_out()
            n_tokens = batch.batch.n_tokens
            first = batch.batch.pos[0] if n_tokens else self.resizer.end
            self._make_fit(first, n_tokens)
            self.decoding = True
            try:
                super().decode(batch)
            finally:
                self.decoding = False
                self.decoded_s = time.monotonic()
                self.resizer.look()
            self.stale = self._taken = False
            if self.resizer.pieces and self.affected_from is None:
                self.affected_from = first

    def _make_fit(self, first: int, n_tokens: int) -> None:
        """Bring back what the next decode needs, and have cells for it."""
        resizer = self.resizer
        masked = [piece for piece in resizer.pieces if piece.masked]
        back = [piece for piece in resizer.pieces if not piece.masked]
        top = max((part.stop for part in resizer.live(parked=True)), default=0)
        while top < first and masked and masked[-1].part.stop > top:
            back.append(masked.pop())  # a batch has to begin behind the last cell
            top = max(top, back[-1].part.stop)
        needed = resizer.used + sum(piece.part.cells for piece in back) + n_tokens
        if resizer.pointer is not None and not back and needed <= resizer.cells:
            return
        try:
            self.undisturbed(lambda: self._fit(needed, n_tokens, back))
        except EngineError as error:
            raise RuntimeError(f"psi-kv: this can't be decoded: {error}") from error

    def _fit(self, needed: int, n_tokens: int, back: list[Any]) -> None:
        resizer = self.resizer
        sizes, now = resizer.sizes, resizer.cells
        enough = now if needed <= now else sizes.grown(needed)
        try:
            resizer.rebuild(lambda live: enough, back=back)
        except EngineError:
            least = sizes.for_cells(resizer.used + n_tokens)
            if resizer.pointer is None or least >= enough:
                raise
            # There is no memory for what was parked: it is passed over, and said so in the result.
            resizer.rebuild(lambda live: max(least, min(resizer.cells, enough)))
            for piece in back:
                piece.masked = True

    def make_whole(self) -> None:
        """All cells, and everything in them. The lock is held. Raises EngineError."""
        resizer = self.resizer
        if (
            resizer.pieces
            or resizer.cells < resizer.sizes.logical
            or (resizer.outputs_limited and not resizer.most_outputs)
        ):
            self.undisturbed(lambda: resizer.rebuild(lambda live: resizer.sizes.logical, back=resizer.pieces))

    def n_ctx(self) -> int:
        """The cells that the program asked for."""
        return self.resizer.sizes.logical

    def kv_cache_clear(self) -> None:
        with self.lock:
            self.resizer.forget()
            super().kv_cache_clear()
            self._changed(0)

    def kv_cache_seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        with self.lock:
            try:
                if self.resizer.pointer is None:
                    self.undisturbed(self.resizer.come_home)
                self.resizer.cut(p0, p1)
            except EngineError as error:
                raise RuntimeError(f"psi-kv: {error}") from error
            removed = bool(super().kv_cache_seq_rm(seq_id, p0, p1))
            self._changed(p0)
            return removed

    def kv_cache_seq_cp(self, seq_id_src: int, seq_id_dst: int, p0: int, p1: int) -> None:
        with self.lock:
            self.pin("the program copies sequences")
            super().kv_cache_seq_cp(seq_id_src, seq_id_dst, p0, p1)

    def kv_cache_seq_keep(self, seq_id: int) -> None:
        with self.lock:
            self.pin("the program keeps sequences apart")
            super().kv_cache_seq_keep(seq_id)

    def kv_cache_seq_shift(self, seq_id: int, p0: int, p1: int, shift: int) -> None:
        with self.lock:
            self.make_whole()
            super().kv_cache_seq_shift(seq_id, p0, p1, shift)
            self._changed(p0)

    def _changed(self, start: int) -> None:
        if self.affected_from is not None and max(0, start) <= self.affected_from:
            self.affected_from = None
        self.resizer.look()

    def get_state_size(self) -> int:
        with self.lock:
            self.make_whole()
            return int(super().get_state_size())

    def get_logits(self) -> Any:
        with self.lock:
            self.fresh()
            return super().get_logits()

    def get_logits_ith(self, i: int) -> Any:
        with self.lock:
            self.fresh()
            return super().get_logits_ith(i)

    def replaced(self) -> None:
        """The program is about to put another state in: there has to be a cell for each. The lock is held."""
        self.resizer.forget()
        self.affected_from = None
        self.make_whole()

    def taken(self, *, last: bool) -> None:
        """Somebody has what the last decode computed, of its last token at least."""
        self._taken = self._taken or last


class _Order:
    """One change of size that somebody waits for."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action
        self.done = threading.Event()
        self.error: EngineError | None = None
