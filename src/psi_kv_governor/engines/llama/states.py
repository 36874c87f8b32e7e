"""Saved states that a Python program keeps: entries of a `LlamaRAMCache`, what `Llama.save_state` gives.

Upstream holds three copies of a state while it saves one, and keeps it in the heap, where nothing can be
parked. Here it is written once, into a mapping of its own that is born in a file: the kernel can take it from
its first byte, and the governor parks it as it parks the entries of a server's prompt cache. Upstream's
`load_state` reads it from there like any other.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import time
import weakref
from typing import Any

import numpy as np

from psi_kv_governor.cache import BlobState, Result
from psi_kv_governor.residence import Mapping, Place

_log = logging.getLogger("psi_kv_governor")
LEAST_BYTES = 1 << 20
"""Smaller states stay where upstream puts them."""
FIRST_ID = 1 << 30
"""Above the numbers that the agent gives to the states it knows."""


class StateMismatchError(RuntimeError, KeyError):
    """A saved state can't be loaded: of another model, or saved with another kind of cache (flash attention).

    A RuntimeError, as upstream's; and a KeyError, so that a prompt cache that holds it counts as a miss.
    """

    def __str__(self) -> str:
        return str(self.args[0])


class SavedBytes(np.ndarray):
    """The bytes of a saved state: equal to what upstream would have given, and pickled as that."""

    _saved: _Saved

    def __eq__(self, other: object) -> Any:
        if isinstance(other, bytes | bytearray | np.ndarray):
            return self.tobytes() == memoryview(other).tobytes()  # type: ignore[arg-type]
        return NotImplemented

    def __ne__(self, other: object) -> Any:
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(self.tobytes())

    def __reduce__(self) -> Any:
        return bytes, (self.tobytes(),)


class _Saved:
    """One state. Lives as long as its bytes."""

    def __init__(self, number: int, mapping: Mapping, n_bytes: int) -> None:
        self.id, self.mapping, self.n_bytes = number, mapping, n_bytes
        self.used_s = time.monotonic()
        self.parked = False


class SavedStates:
    """Those that were saved here and are still kept by somebody."""

    def __init__(self, place: Place | None) -> None:
        self._place = place
        self._numbers = itertools.count(FIRST_ID)
        self._kept: weakref.WeakValueDictionary[int, _Saved] = weakref.WeakValueDictionary()

    def save(self, llm: Any) -> Any:
        """`llm.save_state()` of upstream. Gives None where that has to do it itself."""
        import llama_cpp

        try:
            n_bytes = llama_cpp.llama_state_get_size(llm._ctx.ctx)
            if n_bytes < LEAST_BYTES:
                return None
            bytes_ = self._written(llm, n_bytes)
            return llama_cpp.llama.LlamaState(
                scores=_copy_of(llm._scores),
                input_ids=llm.input_ids.copy(),
                n_tokens=llm.n_tokens,
                llama_state=bytes_,
                llama_state_size=len(bytes_),
                seed=llm._seed,
            )
        except (AttributeError, TypeError, OSError) as error:
            _log.info("a state is saved by llama_cpp itself: %s", error)
            return None

    def _written(self, llm: Any, n_bytes: int) -> SavedBytes:
        import llama_cpp

        # Whatever is chosen for caches: this one is written once, and then waits.
        mapping = Mapping(n_bytes, backing="file" if self._place else "memory", place=self._place)
        buffer = (ctypes.c_uint8 * n_bytes).from_address(mapping.address)
        n = llama_cpp.llama_state_get_data(llm._ctx.ctx, buffer, n_bytes)
        if not 0 < n <= n_bytes:
            raise OSError(f"llama.cpp wrote {n} of {n_bytes} bytes")
        found: SavedBytes = np.frombuffer(memoryview(mapping.buffer), dtype=np.uint8, count=n).view(
            SavedBytes
        )
        found.flags.writeable = False
        found._saved = _Saved(next(self._numbers), mapping, n)
        self._kept[found._saved.id] = found._saved
        return found

    def used(self, state: Any) -> None:
        """`state` is being loaded, and so is read back: at once, and not page by page as it is copied."""
        saved = getattr(getattr(state, "llama_state", None), "_saved", None)
        if isinstance(saved, _Saved):
            if saved.parked:
                saved.mapping.unpark([(0, saved.mapping.n_bytes)])
            saved.used_s, saved.parked = time.monotonic(), False

    def blobs(self) -> tuple[BlobState, ...]:
        """Each of them."""
        return tuple(
            BlobState(
                id=one.id, n_bytes=one.n_bytes, parked=one.parked, last_used_s=one.used_s, kind="prompt"
            )
            for one in list(self._kept.values())
        )

    def park(self, number: int) -> Result:
        """Have its bytes leave memory."""
        saved = self._kept.get(number)
        if saved is None:
            return Result(problem="the saved state is gone")
        done = saved.mapping.park([(0, saved.mapping.n_bytes)])
        saved.parked = done.finished and not done.problem
        return Result(
            bytes_returned=done.bytes_returned,
            written_bytes=done.written_bytes,
            done=done.finished,
            problem=done.problem,
        )


def _copy_of(scores: Any) -> Any:
    """Upstream keeps a row of logits for each token of a batch, which it fills only with `logits_all`: 100 MB
    of zeros with every state of the demo model. Zeros are kept as one. They are looked at as bits: nobody
    wrote this memory, and NumPy warns of what is no number there."""
    if scores.size and not scores.view(np.uint32).any():
        return np.broadcast_to(np.zeros(1, dtype=np.single), scores.shape)
    return scores.copy()


def load(llm: Any, state: Any, upstream: Any, states: SavedStates | None) -> None:
    """`llm.load_state(state)` by `upstream`. Where that fails the model is empty, and usable. Raises
    StateMismatchError."""
    import llama_cpp

    if states is not None:
        states.used(state)
    try:
        upstream(state)
    except RuntimeError as error:
        llm.n_tokens = 0
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llm._ctx.ctx), True)
        why = (
            f"a saved state can't be loaded ({error}): it is of another model, or was saved with flash "
            "attention the other way; it is passed over"
        )
        _log.warning("%s", why)
        raise StateMismatchError(why) from error
