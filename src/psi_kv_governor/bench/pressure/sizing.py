"""How much memory a model with a full cache takes, measured in a process of its own.

python -m psi_kv_governor.bench.pressure.sizing MODEL CELLS THREADS
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec

from psi_kv_governor.bench.guardian import package_path
from psi_kv_governor.bench.sampling import sample
from psi_kv_governor.bench.worker import PREFILL_BATCH, plain_arguments, prompt_text
from psi_kv_governor.errors import PsiKvError

_TIMEOUT_S = 600.0


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """What plain llama.cpp takes. Its cache is resident from the start, whatever is in it."""

    resident_bytes: int
    """Of the whole process, weights and all, after the first batch of a prompt."""
    weights_bytes: int
    """The model's file, which is mapped."""
    cell_bytes: int
    """K and V of one token in every layer."""


def size_of(model: Path, cells: int, threads: int) -> Size:
    """Measure it. Raises PsiKvError where the model can't be run."""
    argv = [sys.executable, "-m", __name__, str(model), str(cells), str(threads)]
    environment = {**os.environ, "PYTHONPATH": package_path()}
    done = subprocess.run(argv, capture_output=True, env=environment, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise PsiKvError(
            f"the model can't be run with {cells} cells: {lines[-1] if lines else 'it was killed'}"
        )
    return msgspec.json.decode(done.stdout, type=Size)


def measure(model: str, cells: int, threads: int) -> Size:
    """Open the model in this process and measure it."""
    import llama_cpp

    llm = llama_cpp.Llama(model, **plain_arguments(cells, threads))
    try:
        tokens = llm.tokenize(prompt_text(PREFILL_BATCH * 8).encode())[: min(PREFILL_BATCH, cells - 1)]
        llm.eval(tokens)
        seen = sample(os.getpid())
        assert seen is not None, "this process is here"
        state_bytes = llama_cpp.llama_state_seq_get_size(llm.ctx, 0)
        return Size(
            resident_bytes=seen.resident_bytes,
            weights_bytes=Path(model).stat().st_size,
            cell_bytes=state_bytes // len(tokens),
        )
    finally:
        llm.close()


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
