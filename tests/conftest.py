"""What every test shares: the demo model, the marks that ask something of the machine, what was skipped."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from platformdirs import user_cache_path

import uml
from psi_kv_governor import model
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.model_fetch import OfflineError
from psi_kv_governor.residence import find_place
from psi_kv_governor.sandbox.sandbox import Sandbox


def _own_sockets() -> None:
    """A folder for sockets that is this process' own.

    Governors of one user hear of each other; the tests of two workers side by side, or a governed program of
    whoever runs them, are not to.
    """
    folder, owner = tempfile.mkdtemp(prefix="psi-kv-"), os.getpid()
    os.environ["XDG_RUNTIME_DIR"] = folder
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))


_own_sockets()

# Threads of ggml that wait spin by default, each on a core that a test beside it has need of: 512 tokens on
# two threads took 2.2 s of processor time on a busy machine, and 1.2 s so. Children inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Nor has a child that imports numpy any use for threads of its own: 0.06 s of processor time each.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# An example that takes 0.2 s, or inputs that take a second, say only that the machine has other work; and a
# fixture that is the same for all examples is what the tests with one ask for.
SUPPRESSED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("busy", deadline=None, suppress_health_check=SUPPRESSED)
settings.load_profile("busy")

if importlib.util.find_spec("llama_cpp") is not None:
    from psi_kv_governor.engines.llama import loader

    loader.load()  # before any test imports llama_cpp: behind it no cache of this process could be governed

# A shell ignores Ctrl-C for what it starts in the background, and children inherit that: the programs that
# the tests interrupt would not notice.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The real model. It is fetched when absent; only where that is impossible its tests are skipped."""
    try:
        return model.demo_model_path()
    except PsiKvError:
        pass
    try:
        return model.fetch()
    except OfflineError as error:
        pytest.skip(f"there is no demo model and no network: {error}")


@pytest.fixture
def folder(tmp_path, request) -> Iterator[Path]:
    """A folder on a disk: /tmp may be memory, and there nothing is parked."""
    yield from _on_a_disk(tmp_path, request)


@pytest.fixture(scope="module")
def folder_of_module(tmp_path_factory, request) -> Iterator[Path]:
    """The same for all tests of a module."""
    yield from _on_a_disk(tmp_path_factory.mktemp("module"), request)


def _on_a_disk(given: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    if find_place(str(given)).place is not None:
        yield given
        return
    path = Path(__file__).parents[1] / "out" / f"tests-{os.getpid()}-{abs(hash(request.node.nodeid))}"
    path.mkdir(parents=True)
    yield path
    shutil.rmtree(path, ignore_errors=True)


SHALLOW_LAYERS = 6


@pytest.fixture(scope="session")
def shallow_model(demo_model: Path) -> Path:
    """A fifth of the real model, for what asks for its words but not for their sense, nor for its size."""
    pytest.importorskip("gguf")
    from gguf_models import write_shallow

    folder = user_cache_path("psi-kv") / "test-models"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{demo_model.stem}-{SHALLOW_LAYERS}-{model.DEMO.sha256[:8]}.gguf"
    if not path.is_file():
        made = folder / f"{path.name}.{os.getpid()}"
        write_shallow(made, demo_model, SHALLOW_LAYERS).replace(path)  # workers may do so side by side
    return path


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory) -> Path:
    """An 8B's cache and next to nothing else, for what asks for memory and no words: 128 KiB a cell."""
    pytest.importorskip("gguf")
    from psikv_bench.wide_model import write_wide_model

    return write_wide_model(tmp_path_factory.mktemp("model") / "wide.gguf", 4096)


@functools.cache
def _why_not(mark: str) -> str:
    """Why tests with `mark` cannot run on this machine; empty when they can."""
    if mark == "llama":
        found = importlib.util.find_spec("llama_cpp")
        return "" if found else "llama-cpp-python is not installed: pip install -e '.[llama]'"
    if mark == "uml":
        return uml.why_not()
    able, why = Sandbox.available("zram" if mark == "swap" else "none")
    return "" if able else why


LONGEST_FIRST = (
    "engines/llama/test_device_memory",
    "pressure/test_whole_machines",
    "test_hardened",
    "packaging/test_wheel",
    "bench/test_fidelity_run",
    "bench/test_small_runs",
    "test_doctor",
    "service/test_device_server",
    "test_simulation",
    "engines/llama/test_what_can_go",
    "engines/llama/test_recall",
    "engines/llama/test_failing_disk",
    "engines/llama/test_engine",
    "engines/llama/test_first_do_no_harm",
    "pressure/test_fuzz",
    "engines/llama/test_always_right",
    "service/test_once",
    "service/test_exec",
    "service/test_exec_bad_input",
    "cli/test_run_and_chat",
    "docs/test_docs_commands",
    "packaging/test_debian_root",
    "service/test_parents",
    "policy/test_planner",
    "service/test_servers",
    "service/test_programs",
    "engines/llama/test_parked_states",
    "control/test_law_properties",
    "examples/test_examples",
)
"""Files that take longest, by processor time. A worker of xdist takes a whole file: one of minutes that began
last would be waited for alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    ranks = {folder / f"{name}.py": rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in ("llama", "cgroup", "swap", "uml"):
        if item.get_closest_marker(mark) is not None and (why := _why_not(mark)):
            pytest.skip(f"{mark}: {why}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says at the end what was skipped and why, each reason once."""
    reasons = Counter(_reason(report) for report in terminalreporter.stats.get("skipped", []))
    terminalreporter.section("skipped and why")
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count:4} {reason}")
    if not reasons:
        terminalreporter.write_line("nothing was skipped")


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The reason of a skip is the last of (file, line, reason)."""
    why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return why.removeprefix("Skipped: ")
