"""What is public is listed, can be had, is light to import, and is all that the documents use."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import psi_kv_governor

ROOT = Path(__file__).parents[1]
ROOMS = ("cache", "engines", "policy", "pressure")
"""Public as well, for who writes an engine, a policy or a source."""
DOORS = ("auto", "engines.transformers", "errors", "policy.pool", "residence")
"""Modules that documents name besides: a front door each, or the means of an engine and a policy."""

OPTIONAL = (
    "click",
    "elftools",
    "platformdirs",
    "prometheus_client",
    "psutil",
    "rich",
    "starlette",
    "uvicorn",
)
LIGHT = f"""
import sys

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Forbidden())
import psi_kv_governor
"""


def light(script: str) -> subprocess.CompletedProcess[str]:
    """Runs `script` where only what the library needs can be imported."""
    return subprocess.run(
        [sys.executable, "-c", LIGHT + script], capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.llama
def test_beside_a_model_nothing_is_loaded_that_only_messages_and_commands_need():
    """They were 1.7 MB: as much as a small machine may have left beside the model."""
    script = (
        "import sys, llama_cpp; before = set(sys.modules)\n"
        "import psi_kv_governor.llama\n"
        "print(*sorted({'difflib', 'email', 'importlib.metadata', 'zipfile'} & (set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.stdout.strip(), done.returncode) == ("", 0), done.stderr


def test_all_that_is_public_can_be_had_and_says_what_it_is():
    assert psi_kv_governor.__all__ == sorted(psi_kv_governor.__all__)
    assert set(psi_kv_governor.__all__) <= set(dir(psi_kv_governor))
    for name in psi_kv_governor.__all__:
        value = getattr(psi_kv_governor, name)
        assert name == "Event" or inspect.getdoc(value), name
    with pytest.raises(AttributeError, match="has no attribute 'Governer'"):
        psi_kv_governor.Governer  # noqa: B018


@pytest.mark.parametrize("room", [*ROOMS, "errors"])
def test_a_public_room_lists_what_it_offers(room):
    module = importlib.import_module(f"psi_kv_governor.{room}")
    assert module.__all__
    assert all(hasattr(module, name) for name in module.__all__)


def test_each_exception_is_exported():
    errors = importlib.import_module("psi_kv_governor.errors")
    raised = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert raised == set(errors.__all__) <= set(psi_kv_governor.__all__)


def imports_of(source: str) -> list[tuple[str, str]]:
    """(module, name) of each import from this package."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("psi_kv_governor"):
            found += [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.startswith("psi_kv_governor")]
    return found


def python_of(path: Path) -> list[str]:
    text = path.read_text()
    return [text] if path.suffix == ".py" else re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_documents_and_examples_use_only_what_is_public():
    public = {f"psi_kv_governor.{name}" for name in (*ROOMS, *DOORS)} | {"psi_kv_governor"}
    used = 0
    for path in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.py")):
        for module, name in (it for source in python_of(path) for it in imports_of(source)):
            used += 1
            assert module in public, f"{path.name} imports {module}, which is internal"
            if name:
                offered = importlib.import_module(module).__all__
                assert name in offered or f"{module}.{name}" in public, f"{path.name}: {module}.{name}"
    assert used > 5


def test_the_library_needs_numpy_and_msgspec_only():
    done = light(
        "names = [n for n in psi_kv_governor.__all__ if n != 'GovernedLlama']\n"
        "[getattr(psi_kv_governor, name) for name in names]\n"
        "from psi_kv_governor.cache import Plan\nfrom psi_kv_governor.engines import engines\n"
        "import sys\n"
        "print(sorted({'numpy', 'msgspec', 'torch', 'llama_cpp'} & set(sys.modules)))\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['msgspec', 'numpy']"


@pytest.mark.llama
def test_a_governed_model_needs_nothing_of_the_command_line():
    done = light("from psi_kv_governor import GovernedLlama\nprint(GovernedLlama.__name__)\n")
    assert (done.returncode, done.stdout.strip()) == (0, "GovernedLlama"), done.stderr


def test_without_the_command_line_s_packages_the_command_says_what_to_install():
    done = light("from psi_kv_governor.cli import main\nmain()\n")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "psi-kv: error: this needs click: pip install 'psi-kv-governor[cli]'\n"
