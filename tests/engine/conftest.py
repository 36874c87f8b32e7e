"""What the engine's tests share: tiny models, and models that close themselves."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_help import SMALL, config
from models import LLAMA, Shape, write_model

from fakes import FakeSource
from psi_kv_governor import GovernedLlama
from psi_kv_governor.store.mounts import memory_backed


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


@pytest.fixture
def folder(tmp_path, request) -> Iterator[Path]:
    """A folder on storage: /tmp may be memory, and there the store refuses to work."""
    if not memory_backed(tmp_path):
        yield tmp_path
        return
    path = Path(__file__).parents[2] / "out" / f"engine-{os.getpid()}-{abs(hash(request.node.nodeid))}"
    path.mkdir(parents=True)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def source() -> FakeSource:
    """The machine's pressure, calm until the test says otherwise."""
    return FakeSource()


@pytest.fixture
def open_llm(tiny_model, folder, source) -> Iterator[Callable[..., GovernedLlama]]:
    """Opens governed models that act by hand only, unless told otherwise, and closes them afterwards."""
    opened = []

    def open_(model: Shape | Path = LLAMA, *, settings: dict | None = None, **arguments) -> GovernedLlama:
        path = tiny_model(model) if isinstance(model, Shape) else model
        chosen = config(**{"store_dir": str(folder), **(settings or {})})
        llm = GovernedLlama(
            str(path), **{**SMALL, "auto": False, "config": chosen, "source": source, **arguments}
        )
        opened.append(llm)
        return llm

    yield open_
    for llm in opened:
        llm.close()
