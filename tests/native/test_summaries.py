"""Summaries of keys, without any engine: what their products are, beside those of the keys themselves."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from psi_kv_governor.errors import EngineError
from psi_kv_governor.native.summaries import Summarizer


def keys_of(kind: str, rows: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys as they lie in memory, and their values."""
    values = np.random.default_rng(3).normal(size=(rows, dim)).astype(np.float32)
    if kind == "bfloat16":
        bits = values.view(np.uint32) >> 16
        return bits.astype(np.uint16), (bits << 16).view(np.float32)
    stored = values.astype(kind)
    return stored, stored.astype(np.float32)


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dim", [16, 64, 128, 80])
def test_products_are_within_half_a_step_of_those_of_the_keys(kind, dim):
    stored, values = keys_of(kind, 40, dim)
    made = Summarizer(kind, dim)
    summaries = made.make(stored.ctypes.data, stored.strides[0], len(stored))
    queries = np.random.default_rng(4).normal(size=(19, dim)).astype(np.float32)
    steps = (values.max(1) - values.min(1)) / 15
    bound = np.abs(queries).sum(1)[:, None] * (steps[None, :] / 2 + 1e-3)
    assert (np.abs(made.dots(queries, summaries) - queries @ values.T) <= bound).all()
    assert made.head_bytes == 8 + dim // 2


def test_keys_that_lie_apart_are_found():
    stored, _ = keys_of("float16", 30, 64)
    made = Summarizer("float16", 64)
    every_third = made.make(stored.ctypes.data, 3 * stored.strides[0], 10)
    np.testing.assert_array_equal(every_third, made.make(stored.ctypes.data, stored.strides[0], 30)[::3])


@pytest.mark.parametrize(("kind", "dim"), [("float64", 64), ("float32", 63), ("float32", 2048)])
def test_keys_without_a_summary_are_refused_by_name(kind, dim):
    with pytest.raises(EngineError, match=f"{dim} values in {kind}"):
        Summarizer(kind, dim)


def test_llama_cpp_is_not_needed():
    """Neither loaded nor stood before."""
    program = (
        "import sys; from psi_kv_governor.native.summaries import Summarizer; Summarizer('float32', 64); "
        "assert not [name for name in sys.modules if 'llama' in name]; "
        "assert 'libllama' not in open('/proc/self/maps').read()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
