"""The same weights without rounding: what is compared is then the caches, not the arithmetic.

The kernels for quantised weights round activations to 8 bits, so that any change anywhere, also one that
means nothing, changes every logit a little. Measured with SmolLM2-135M Q4_1 at 2,048 tokens: without one dull
cell, and also with no cell missing but other batches, the divergence is 0.003 nats and one most probable
token in twenty is another. With the same weights in f32: 0.000005 nats, and none.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from psi_kv_governor.errors import PsiKvError

Weights = Literal["f32", "file"]

MOST_BYTES = 512 << 20
"""Largest file whose weights are taken to f32 unless that is asked for: eight times as much at 4 bits."""
_ALL_F32 = 0  # enum llama_ftype, <llama.h>


@contextmanager
def weights(model: Path, which: Weights) -> Iterator[Path]:
    """The file to read: `model` itself, or its weights in f32, in a folder that is gone afterwards.

    Raises PsiKvError where the file can't be converted.
    """
    if which == "file":
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="psi-kv-") as folder:
        path = Path(folder) / "f32.gguf"
        _convert(model, path)
        yield path


def _convert(model: Path, path: Path) -> None:
    from psi_kv_governor.engines.llama import loader

    loader.load()  # before llama_cpp: a model that is opened later in this process is governed
    import llama_cpp
    from llama_cpp._logger import set_verbose

    set_verbose(False)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = _ALL_F32
    params.allow_requantize = True
    if llama_cpp.llama_model_quantize(str(model).encode(), str(path).encode(), params):
        raise PsiKvError(
            f"llama.cpp can't take the weights of {model.name} to f32 in {path.parent}: set TMPDIR to a "
            "larger disk, or say --weights file"
        )
