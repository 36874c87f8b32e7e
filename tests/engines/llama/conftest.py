"""What the tests of the engine for llama.cpp share: tiny models, and contexts that close themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fakes import FakeSource
from gguf_models import LARGE, LLAMA, Shape, write_model
from psi_kv_governor.config import GovernorConfig
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


@pytest.fixture
def open_tiny(tiny_model, folder) -> Iterator[Callable[..., Any]]:
    """Opens governed models that act by hand only, unless asked otherwise: with these settings and arguments
    of a file of tests, and those of one test."""
    from psi_kv_governor.llama import GovernedLlama

    opened = []

    def open_(
        common: dict[str, Any],
        small: dict[str, Any],
        shape: Shape = LARGE,
        *,
        settings=None,
        **arguments: Any,
    ) -> GovernedLlama:
        chosen = {"place": str(folder), "status_socket": False, **common, **(settings or {})}
        given = {**small, "auto": False, "source": FakeSource(), **arguments}
        opened.append(GovernedLlama(str(tiny_model(shape)), config=GovernorConfig(**chosen), **given))
        return opened[-1]

    yield open_
    for llm in opened:
        llm.close()
