"""Batches of tokens as llama.cpp takes them, whole or in part, and how their decoding is interrupted."""

from __future__ import annotations

import ctypes
import logging
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import _internals

from psi_kv_governor.engine.llama.tap import Tap

_ABORTED = 2
"""What llama_decode returns when the abort callback said so (llama.h)."""


def decoded(context: _internals.LlamaContext, raw: llama_cpp.llama_batch, tap: Tap) -> bool:
    """Have llama.cpp decode `raw`; False where `tap` interrupted it. Raises RuntimeError as upstream does.

    Of a batch that was interrupted the micro-batches that were through stay in the cache.
    """
    code = _internals.llama_cpp.llama_decode(context.ctx, raw)
    # Who interrupts waits for the lock that is held here: it is still wanted. Else somebody else aborted.
    if code == _ABORTED and tap.counters.interrupt:
        return False
    if code != 0:
        raise RuntimeError(f"llama_decode returned {code}")
    return True


def interrupt(tap: Tap, wanted: bool) -> None:
    """End the decode that runs before its next node, if it is one that is run again; see SafePoint.

    llama.cpp warns on stderr of what it takes out of the cache then, which is nobody's concern.
    """
    logger = logging.getLogger("llama-cpp-python")
    if wanted:
        if logger.level == logging.ERROR:  # not with verbose=True
            logger.setLevel(logging.CRITICAL)
    elif logger.level == logging.CRITICAL:
        logger.setLevel(logging.ERROR)
    tap.interrupt(wanted)


class Batch:
    """Tokens of the main sequence as llama.cpp takes them, of which a part can be decoded by itself."""

    def __init__(self, context: _internals.LlamaContext, raw: llama_cpp.llama_batch) -> None:
        self.n_tokens = int(raw.n_tokens)
        self.start = int(raw.pos[0])
        self.tokens = np.array(raw.token[: self.n_tokens], dtype=np.int32) if raw.token else None
        """Shape (n_tokens,); None for input that has none (images)."""
        self.insistent = False
        """It is not interrupted any more."""
        self._context = context
        self._raw = raw

    def divisible(self) -> bool:
        """Whether it may be decoded in parts: the outputs of all but its last token are not wanted."""
        return self.tokens is not None and not any(self._raw.logits[: self.n_tokens - 1])

    def part(self, first: int, count: int) -> npt.NDArray[np.int32] | None:
        """The tokens of a part."""
        return None if self.tokens is None else self.tokens[first : first + count]

    def run(self, first: int, count: int, tap: Tap) -> bool:
        """Decode `count` tokens from `first` on; see `decoded`."""
        if count == self.n_tokens:
            return decoded(self._context, self._raw, tap)
        raw = llama_cpp.llama_batch()
        raw.n_tokens = count
        for name in ("token", "pos", "n_seq_id", "seq_id", "logits"):
            pointer = getattr(self._raw, name)
            setattr(raw, name, ctypes.cast(_at(pointer, first), type(pointer)))
        return decoded(self._context, raw, tap)


def _at(pointer: Any, index: int) -> ctypes.c_void_p:
    """The address of one element."""
    address = ctypes.cast(pointer, ctypes.c_void_p).value or 0
    return ctypes.c_void_p(address + index * ctypes.sizeof(pointer._type_))
