"""What the tests of the engine for llama.cpp share: tiny models, and contexts that close themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gguf_models import LLAMA, Shape, write_model
from psi_kv_governor.engines.llama import loader


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Callable[[Shape], Path]:
    """Writes a tiny model of a shape, once a session."""
    made: dict[Shape, Path] = {}
    folder = tmp_path_factory.mktemp("models")

    def write(shape: Shape = LLAMA) -> Path:
        if shape not in made:
            made[shape] = write_model(folder / f"{len(made)}-{shape.arch}.gguf", shape)
        return made[shape]

    return write


@pytest.fixture(scope="session")
def agent() -> loader.Agent:
    """The agent in this process, with llama_cpp behind it."""
    loaded = loader.load()
    assert loaded.agent is not None, loaded.why
    return loaded.agent
