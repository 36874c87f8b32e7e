"""Children of this package: nothing that lies in the working directory is run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import psi_kv_governor
from psi_kv_governor.children import python_command

SOURCES = Path(psi_kv_governor.__file__).parent


@pytest.fixture
def trap(tmp_path) -> Path:
    """A folder in which everything that we import lies, and would leave a trace."""
    for name in ("msgspec", "numpy", "psi_kv_governor", "click", "json", "pip"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w').close()\n")
    return tmp_path


def test_a_child_runs_nothing_from_the_working_directory_or_pythonpath(trap):
    environ = {**os.environ, "PYTHONPATH": str(trap)}
    command = python_command("psi_kv_governor.cli", "--version")
    done = subprocess.run(
        command, cwd=trap, env=environ, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "psi-kv" in done.stdout
    assert not (trap / "sprung").exists()


def test_a_child_gets_its_arguments_as_they_are():
    command = python_command("psi_kv_governor.cli", "simulate", "--help")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "--scenario" in done.stdout


def test_no_child_is_started_otherwise():
    """Outside of the benchmarks, whose children are theirs: `python -m` looks into the working directory."""
    for path in SOURCES.rglob("*.py"):
        if path.name != "children.py" and "bench" not in path.parts:
            for line in path.read_text().splitlines():
                assert "[sys.executable" not in line or '"-I"' in line, (path, line)


WITHOUT_FORK = """
import os
del os.register_at_fork, os.fork
import psi_kv_governor, psi_kv_governor.lifetime, psi_kv_governor.status_socket
import psi_kv_governor.pressure.neighbours
import psi_kv_governor.engines.llama.fleet, psi_kv_governor.residence, psi_kv_governor.llama
"""


def test_a_system_that_knows_no_fork_imports_all_the_same():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_FORK], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_there_is_one_place_for_forks():
    found = [path.name for path in SOURCES.rglob("*.py") if "register_at_fork" in path.read_text()]
    assert found == ["forks.py"]
