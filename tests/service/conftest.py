"""What the tests of the service share: programs under `psi-kv exec`, and real servers."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from servers import PSI_KV, debian_server, python_with_servers
from service_help import compiled_in, paper

from fakes import FakeSource
from gguf_models import Shape, write_model
from packages_help import Unavailable
from psi_kv_governor.engines.simulated import SimulatedEngine
from psi_kv_governor.governor import Governor
from waiting import PATIENCE_S

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run() -> Run:
    """Runs a program under `psi-kv exec` to its end."""

    def run_(
        *program: str, options: tuple[str, ...] = (), before: tuple[str, ...] = (), **more
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*before, *PSI_KV, "exec", *options, "--", *program],
            capture_output=True, text=True, timeout=PATIENCE_S, check=False, **more,
        )  # fmt: skip

    return run_


@pytest.fixture
def compiled(tmp_path) -> Callable[..., Path]:
    """Compiles a piece of C."""

    return functools.partial(compiled_in, tmp_path)


@pytest.fixture(scope="session")
def python_of_servers() -> Path:
    """A Python with the servers of `xllamacpp` and `llama_cpp`."""
    try:
        return python_with_servers()
    except Unavailable as error:
        pytest.skip(f"the servers of xllamacpp and llama_cpp can't be had here: {error}")


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory) -> Path:
    """A model whose tokens are bytes, with 4 KiB a cell: its caches are large, and hundreds of its tokens
    take no time."""
    shape = Shape("llama", n_layer=4, n_head=4, n_head_kv=4, n_ctx=131_072)
    return write_model(tmp_path_factory.mktemp("model") / "bytes.gguf", shape)


@pytest.fixture(scope="session", params=["xllamacpp", "debian"])
def server_command(request, byte_model) -> Callable[[int], list[str]]:
    """The command of a real llama-server at a port: default flags, 131,072 cells, 4 slots, and one thread
    (two on a busy machine wait for each other)."""
    if request.param == "xllamacpp":
        python = str(request.getfixturevalue("python_of_servers"))
        script = str(Path(__file__).with_name("xllamacpp_server.py"))
        return lambda port: [python, script, str(byte_model), str(port), "131072"]
    try:
        program = debian_server()
    except Unavailable as error:
        pytest.skip(f"Debian's llama-server can't be had here: {error}")
    return lambda port: [*program, "-m", str(byte_model), "-c", "131072", "-t", "1", "--port", str(port)]


@pytest.fixture
def xllamacpp(python_of_servers, byte_model) -> Callable[[int], list[str]]:
    script = str(Path(__file__).with_name("xllamacpp_server.py"))
    return lambda port: [str(python_of_servers), script, str(byte_model), str(port), "4096"]


@pytest.fixture
def python() -> str:
    return sys.executable


@pytest.fixture
def machine() -> Iterator[tuple[Governor, SimulatedEngine, FakeSource]]:
    """A governor over an engine on paper, and a machine set by hand."""
    made = paper()
    yield made
    made[0].close()


@pytest.fixture
def patient_end(monkeypatch) -> None:
    """The streams of a dashboard end by themselves half a second after it. After a second they are cut off:
    too early where this process stood still meanwhile."""
    monkeypatch.setattr("psi_kv_governor.service.dashboard.server._END_S", PATIENCE_S)


@pytest.fixture
def governor(machine) -> Governor:
    return machine[0]


@pytest.fixture
def engine(machine) -> SimulatedEngine:
    return machine[1]


@pytest.fixture
def source(machine) -> FakeSource:
    return machine[2]
