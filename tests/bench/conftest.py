"""What the tests of the benchmarks share."""

from __future__ import annotations

import pytest

from psi_kv_governor import model
from psi_kv_governor.gguf_file import GgufFile
from psi_kv_governor.sandbox.load import MIB
from psi_kv_governor.sandbox.sandbox import Sandbox
from psikv_bench import options as bench_options
from psikv_bench.pressure import preflight, setting
from psikv_bench.pressure.setting import Size


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine on which all is well, as far as sandboxes and the model go; each answer can be changed."""
    file = tmp_path / "any.gguf"
    file.write_bytes(b"GGUF")
    able = {"none": (True, ""), "zram": (True, "")}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Sandbox, "available", staticmethod(lambda swap="none": able[swap]))
    for where in (bench_options, preflight):
        monkeypatch.setattr(where, "demo_model_path", lambda: file)
    monkeypatch.setattr(model, "check", lambda path: None)
    monkeypatch.setattr(preflight, "check", lambda path: GgufFile(path, 98_000_000, 3, "llama", 1))
    size = Size(resident_bytes=64 * MIB, weights_bytes=50 * MIB, cell_bytes=100)
    monkeypatch.setattr(setting, "size_of", lambda *_: size)
    return able
