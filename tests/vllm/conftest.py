"""What the tests of a real vLLM share: its environment, made by `make test-vllm`.

Without it they are skipped, and the end of the run says so: 2.5 GB that nothing else here has need of.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # vllm_scene

MODEL = Path(sys.prefix) / "small"
"""The demo model with 6 of its 30 layers: real weights, and a fifth of the time."""


def why_not() -> str:
    """Why there is no vLLM to test with; '' where there is."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:  # without one it is the folder of these tests
        return "vLLM is not installed here: make test-vllm"
    return "" if (MODEL / "config.json").exists() else f"{MODEL} holds no model: make test-vllm"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            if why := why_not():
                item.add_marker(pytest.mark.skip(reason=f"vllm: {why}"))


@pytest.fixture(scope="session")
def served_model() -> Path:
    """The demo model, as vLLM reads it."""
    return MODEL
