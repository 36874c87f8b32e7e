"""Proves, on the open context, that rows are where the tap says and that releasing pages harms no live one.

Run at every start, and by `python -m psi_kv_governor.engine.llama.selftest --model FILE`. Where it fails,
the governor releases nothing and says why (invariant 1).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import llama_cpp
import numpy as np
from llama_cpp import _internals

from psi_kv_governor.engine.base import Capabilities, Capability
from psi_kv_governor.engine.llama.context import Sequences
from psi_kv_governor.engine.llama.rows import Rows
from psi_kv_governor.engine.llama.tap import Tap
from psi_kv_governor.errors import EngineError

_PATTERN = 0xA5
_PROBE_TOKENS = 2
# Cells between the two that the probe decodes into and the first that is overwritten and released.
_GAP_CELLS = 8
_PROBE_BYTES = 64 << 10


@dataclass(frozen=True)
class Proof:
    """What the self-test found: the rows that can be reached, and what can be done with them."""

    rows: Rows | None
    able: Capabilities


def unable(why: str) -> Capabilities:
    """Capabilities of a cache with which nothing can be done."""
    off = Capability(False, why)
    return Capabilities(release=off, spill=off, recompute=off)


def prove(context: _internals.LlamaContext, tap: Tap) -> Proof:
    """Decode two tokens, look where they went, release free cells beside them, and forget the tokens.

    Costs one pass over the weights, which also brings them in. Nothing of it stays in the cache.
    """
    tap.reserve(context.n_ctx())
    try:
        _decode_probe(context)
        return _examine(context, tap)
    except EngineError as error:
        return Proof(None, unable(str(error)))
    finally:
        llama_cpp.llama_memory_clear(context.memory, False)
        llama_cpp.llama_perf_context_reset(context.ctx)
        tap.clear()


def _decode_probe(context: _internals.LlamaContext) -> None:
    bos = max(0, context.model.token_bos())
    batch = _internals.LlamaBatch(n_tokens=_PROBE_TOKENS, embd=0, n_seq_max=1, verbose=False)
    try:
        batch.set_batch([bos] * _PROBE_TOKENS, n_past=0, logits_all=False)
        context.decode(batch)
    except RuntimeError as error:
        raise EngineError(f"the self-test could not decode ({error})") from error
    finally:
        batch.close()


def _examine(context: _internals.LlamaContext, tap: Tap) -> Proof:
    n_caches = tap.n_caches()
    tensors = tap.lead_and_tensors()
    if problem := tap.problem():
        raise EngineError(problem)
    if not tensors:
        raise EngineError("the model has no KV cache of rows (a recurrent model keeps one state instead)")
    rows = Rows(tap.native, tensors)
    if not any(tensor.info.host for tensor in tensors):
        raise EngineError(
            "the KV cache is in GPU memory: offload_kqv=False keeps it where it can be returned"
        )
    cells = tap.cells()
    if n_caches == 1:
        _check_rows(context, rows, [int(cell) for cell in cells])
    note = _check_release(tap, rows, [int(cell) for cell in cells])
    if len(rows.tensors) < len(tensors):
        note = "only K can be returned: V is transposed without flash attention, or on a GPU"
    return Proof(rows, _capabilities(context, n_caches, note))


def _check_rows(context: _internals.LlamaContext, rows: Rows, cells: list[int]) -> None:
    if len(cells) != _PROBE_TOKENS:
        raise EngineError(f"two tokens were decoded, and {len(cells)} cells were seen")
    saved = Sequences(context).saved(Sequences.MAIN, (ctypes.c_uint8 * (4 * rows.cell_bytes + (1 << 20)))())
    if not all(rows.are_in(saved, cell) for cell in cells):
        raise EngineError("the rows are not where the graph says: this llama.cpp is not understood")


def _check_release(tap: Tap, rows: Rows, cells: list[int]) -> str:
    """Overwrite free cells, release them, and compare: they are zero, and the live rows are untouched."""
    first = max(cells) + _GAP_CELLS
    last = min(rows.n_cells, first + max(1, _PROBE_BYTES // rows.smallest_row_bytes))
    if not any(len(rows.whole_pages(i, first, last)) for i in range(len(rows.tensors))):
        return "the cache is too small for a whole page"
    probe = np.arange(first, last)
    before = [rows.copy(cell) for cell in cells]
    rows.fill(probe, _PATTERN)
    returned = rows.release(np.array([[first, last, first, last]], dtype=np.int64))
    if returned == 0:
        raise EngineError("released pages stayed resident")
    if any(np.any(rows.whole_pages(i, first, last)) for i in range(len(rows.tensors))):
        raise EngineError("released pages kept their content")
    if [rows.copy(cell) for cell in cells] != before:
        raise EngineError("releasing free cells changed live ones")
    rows.fill(probe, 0)
    rows.release(np.array([[first, last, first, last]], dtype=np.int64))
    return ""


def _capabilities(context: _internals.LlamaContext, n_caches: int, note: str) -> Capabilities:
    model = context.model.model
    yes = Capability(True, note)
    why = ""
    if llama_cpp.llama_model_is_recurrent(model) or llama_cpp.llama_model_is_hybrid(model):
        why = (
            "a recurrent or hybrid model folds all tokens into one state, so a middle range can't be given up"
        )
    elif n_caches > 1:
        why = "a sliding-window model keeps two caches, of which the small one can't give up a middle range"
    if why:
        return Capabilities(release=yes, spill=Capability(False, why), recompute=Capability(False, why))
    return Capabilities(release=yes, spill=yes, recompute=Capability(True))


def main() -> None:
    """Open a model, run the self-test, and print what can be done; exit status 1 when nothing can."""
    import argparse
    import sys

    from psi_kv_governor.engine.llama.llm import GovernedLlama

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", required=True, help="a GGUF file")
    llm = GovernedLlama(parser.parse_args().model, n_ctx=512, auto=False, verbose=False)
    able = llm.governor.capabilities
    for step in ("release", "spill", "recompute"):
        capability = getattr(able, step)
        print(
            f"{step}: {'yes' if capability.able else 'no'}{f' ({capability.why})' if capability.why else ''}"
        )
    llm.close()
    sys.exit(0 if able.release.able else 1)


if __name__ == "__main__":
    main()
