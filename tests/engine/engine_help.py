"""Steps that the engine's tests repeat."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import psi_kv_governor
from psi_kv_governor import GovernedLlama  # before llama_cpp, as a user would
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.ledger import LIVE, LOST, SPILLED
from psi_kv_governor.policy.base import Range

import llama_cpp  # isort: skip

SOURCES = Path(psi_kv_governor.__file__).parents[1]
SMALL: dict[str, Any] = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
"""One thread: with more, ggml's spinning makes a test's time depend on what else runs."""


def config(**settings: Any) -> GovernorConfig:
    """Protection and blocks to the measure of a context of some hundred tokens."""
    sizes = {"sink_cells": 16, "window_cells": 32, "block_cells": 16, "floor_cells": 32, "floor_share": 0.1}
    return GovernorConfig(**{**sizes, **settings})


def some_tokens(n: int, seed: int = 0) -> list[int]:
    """Any tokens but the special ones, the same for the same seed."""
    return np.random.default_rng(seed).integers(3, 270, size=n).tolist()


def logits(llm: llama_cpp.Llama) -> npt.NDArray[np.float32]:
    """The logits of the last token decoded, shape (n_vocab,)."""
    last = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    return np.ctypeslib.as_array(last, shape=(llm.n_vocab(),)).copy()


def logits_after(llm: llama_cpp.Llama, token: int) -> npt.NDArray[np.float32]:
    """Decode `token`, and give the logits."""
    llm.eval([token])
    return logits(llm)


def plain_twin(llm: GovernedLlama, **settings: Any) -> llama_cpp.Llama:
    """A plain Llama of the same model with the same settings, empty."""
    return llama_cpp.Llama(llm.model_path, **{**SMALL, "flash_attn": True, **settings})


def greedy(llm: llama_cpp.Llama, prompt: list[int], n: int) -> list[int]:
    """The `n` most likely tokens after `prompt`, each given to the next."""
    generated = llm.generate(prompt, temp=0.0)
    tokens = [next(generated) for _ in range(n)]
    generated.close()
    return tokens


def rows_at(llm: GovernedLlama, position: int) -> bytes:
    """The rows of one live position in every tensor, straight from the cache's memory."""
    engine = llm._engine
    cell = int(engine.track.map.cells(Range(position, position + 1))[0])
    return b"".join(engine._rows.copy(cell))


def places(llm: GovernedLlama) -> dict[int, int]:
    """Where each position is, by the ledger."""
    ledger = llm._engine.ledger
    return {p: place for place in (LIVE, SPILLED, LOST) for run in ledger.ranges(place) for p in range(*run)}


RECOMPUTED = 5e-3
"""Logits of the tiny models after recomputing differ so much at most: other batches sum in another order, and
rows are f16. With the hole left open they differ by more than 1."""


def assert_map_is_true(llm: GovernedLlama) -> None:
    """Every live position has, by llama.cpp's own account, the rows of the cell that the map says."""
    engine = llm._engine
    live = [p for run in engine.ledger.ranges(LIVE) for p in range(*run)]
    engine.track.check(live)
    assert engine.track.distrust == ""


def spill(llm: GovernedLlama, *ranges: tuple[int, int]) -> int:
    """Spill just these positions; gives the bytes returned."""
    result = llm._engine.trim([Range(*run) for run in ranges], llm.governor._store)
    assert result.spilled == result.cells == sum(stop - start for start, stop in ranges)
    return result.bytes_returned


def evict(llm: GovernedLlama, *ranges: tuple[int, int]) -> int:
    """Evict just these positions; gives the bytes returned."""
    result = llm._engine.trim([Range(*run) for run in ranges], None)
    assert result.cells == sum(stop - start for start, stop in ranges)
    assert result.spilled == 0
    return result.bytes_returned


def anonymous_bytes() -> int:
    """Anonymous memory of this process by the kernel's own account."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) << 10
    raise AssertionError("the kernel does not tell")


def open_files() -> int:
    """File descriptors of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


def run_python(script: str, *arguments: object, timeout_s: float = 60, **environ: str) -> str:
    """Run `script` in a process of its own; gives what it printed. Fails when it does."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(SOURCES), **environ},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
