"""What the tests of native evidence share: models governed by hand only, and captured queries."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.models import Shape, write_model
from fakes import FakeSource
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.policy import registry

SETTINGS: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False}


@pytest.fixture
def install(tmp_path, monkeypatch) -> Iterator[Callable[[str, dict[str, str]], None]]:
    """Installs a package with these modules, whose entry points for policies are `points`."""

    def install_(points: str, modules: dict[str, str]) -> None:
        for name, text in modules.items():
            (tmp_path / name).write_text(text)
            monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
        info = tmp_path / "plugged-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[psi_kv_governor.policies]\n{points}\n")
        monkeypatch.syspath_prepend(tmp_path)
        registry.plug_ins.cache_clear()

    yield install_
    registry.plug_ins.cache_clear()


class Capture(ctypes.Structure):
    """`struct capture` of capture.c."""

    _fields_ = (
        ("layer", ctypes.c_int32),
        ("n_tokens", ctypes.c_int32),
        ("n_head", ctypes.c_int32),
        ("dim", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("queries", ctypes.c_float * (1 << 20)),
    )

    def taken(self) -> np.ndarray:
        """The queries of the newest graph, times the scale, shape (n_tokens, n_head, dim)."""
        shape = (self.n_tokens, self.n_head, self.dim)
        return np.ctypeslib.as_array(self.queries)[: np.prod(shape)].reshape(shape) * self.scale


@pytest.fixture(scope="session")
def capture_library(tmp_path_factory) -> ctypes.CDLL:
    from psi_kv_governor.engine.llama import native

    built = tmp_path_factory.mktemp("capture") / "capture.so"
    source = Path(__file__).with_name("capture.c")
    command = [native.compiler(), "-O1", "-shared", "-fPIC", f"-I{native.header_dir()}", source, "-o", built]
    subprocess.run(command, check=True, capture_output=True)
    return ctypes.CDLL(str(built))


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """A model of 4 layers, with 4 query heads on 2 key heads of 64: prompts take milliseconds."""
    folder = tmp_path_factory.mktemp("models")
    return write_model(folder / "small.gguf", Shape("llama", n_layer=4, n_head=4, n_head_kv=2))


@pytest.fixture
def open_llm(small_model) -> Iterator[Callable[..., Any]]:
    """Opens models governed by hand only, and closes them afterwards."""
    from psi_kv_governor import GovernedLlama

    opened = []

    def open_(
        policy: str = "window", *, model: Path = small_model, settings: dict | None = None, **arguments: Any
    ) -> Any:
        sizes = {"sink_cells": 16, "window_cells": 32, "block_cells": 16, "store": "none"}
        config = GovernorConfig(**{**sizes, "policy": policy, **(settings or {})})
        chosen = {**SETTINGS, "auto": False, "config": config, "source": FakeSource(), **arguments}
        llm = GovernedLlama(str(model), **chosen)
        opened.append(llm)
        return llm

    yield open_
    for llm in opened:
        llm.close()


@pytest.fixture
def open_captured(demo_model, capture_library) -> Iterator[Callable[..., Any]]:
    """Opens the demo model as a plain Llama whose queries in one layer are captured; gives both."""
    import llama_cpp
    from llama_cpp import _internals

    opened = []

    def open_(layer: int, **arguments: Any) -> tuple[Any, Capture]:
        llm = llama_cpp.Llama(str(demo_model), **{**SETTINGS, "flash_attn": True, **arguments})
        opened.append(llm)
        capture = Capture(layer=layer)
        llm._ctx.close()
        llm.context_params.cb_eval = llama_cpp.ggml_backend_sched_eval_callback(
            ctypes.cast(capture_library.capture_eval, ctypes.c_void_p).value
        )
        llm.context_params.cb_eval_user_data = ctypes.addressof(capture)
        llm._ctx = _internals.LlamaContext(model=llm._model, params=llm.context_params, verbose=False)
        llm._stack.callback(llm._ctx.close)
        return llm, capture

    yield open_
    for llm in opened:
        llm.close()
