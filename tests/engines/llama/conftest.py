"""What the tests of the engine for llama.cpp share: tiny models, and contexts that close themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pausing import Pausing
from torture import Context

from fakes import FakeSource
from gguf_models import LARGE, LLAMA, Shape, write_model
from psi_kv_governor.config import GovernorConfig
from psi_kv_governor.engines.llama import loader, telling
from psi_kv_governor.engines.llama.client import Client, InProcess


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
def client(agent) -> Client:
    """Speaks to the agent in this process."""
    return Client(InProcess(agent.serve))


@pytest.fixture
def open_raw(tiny_model, folder, agent) -> Iterator[Callable[..., Context]]:
    """Opens plain contexts over the agent, used through llama.cpp's own functions."""
    import llama_cpp as api

    contexts, models = [], []

    def open_(*, in_file: bool, **given: Any) -> Context:
        agent.configure(str(folder), in_file=in_file, reserve_bytes=0, limit_bytes=0)
        api.llama_backend_init()
        path = str(tiny_model(LARGE)).encode()
        models.append(api.llama_model_load_from_file(path, api.llama_model_default_params()))
        contexts.append(Context(api, models[-1], flash=True, **{"n_ubatch": 256, **given}))
        return contexts[-1]

    yield open_
    for context in contexts:
        api.llama_free(context.ctx)
    for model in models:
        api.llama_model_free(model)


@pytest.fixture
def pausing() -> Pausing:
    """Stops a graph of `open_raw(callback=pausing.function)`."""
    import llama_cpp as api

    return Pausing(api)


@pytest.fixture
def running(monkeypatch) -> None:
    """What was decoded counts as running, also where the machine then stood still for a second: what is idle
    is parked whole, and nothing of it masked."""
    from psi_kv_governor.engines.llama.resize import engine

    for module in (telling, engine):
        monkeypatch.setattr(module, "_RUNNING_S", math.inf)


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
